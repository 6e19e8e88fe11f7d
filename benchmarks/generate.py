"""Decode, prefill, long contexts and peak memory: a plain model, this library and the released code, in one run.

    python benchmarks/generate.py --released CHECKOUT --released-python PYTHON   # 0.54 B: needs 10 GB
    python benchmarks/generate.py --layers 2 --rounds 3 --prefill 16 256         # small, to try it

CHECKOUT holds the authors' modeling_qwen2_parscale.py, PYTHON has transformers 4.53.3 and einops; without them their
rows are missing. Each code runs in a process of its own, one step at a time in turn, and is timed there. CPU only.
`floor_ms` is the time to read what a decoded token must read (weights, active streams, cache) at the bandwidth
measured in this run. Rows: median, quartiles, and the median over rounds of the ratio to the plain model.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core import shape
from record import interleaved, summary, write

WIDTHS = (1, 2, 4, 8)
DIMENSIONS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "tie_word_embeddings", "max_position_embeddings",
)  # fmt: skip


class Worker:
    """A process of worker.py; use it with `with`."""

    def __init__(self, python: str, **settings: Any) -> None:
        script = str(Path(__file__).with_name("worker.py"))
        self.python = python
        self.process = subprocess.Popen(
            [python, script, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def run(self, case: str | None, do: str, *arguments: Any) -> dict[str, Any]:
        """{"seconds": …, "result": …} of one step."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"case": case, "do": do, "arguments": arguments}) + "\n")
        self.process.stdin.flush()
        return json.loads(self._answer())

    def step(self, case: str, do: str, *arguments: Any) -> Callable[[], float]:
        """The step as a case for `interleaved`."""
        return lambda: self.run(case, do, *arguments)["seconds"]

    def _answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.python} stopped with {self.process.wait()}")
        return line

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()


class Codes:
    """The processes of all codes that are at hand, with the same weights' kind in each."""

    def __init__(self, options: argparse.Namespace, weights: str, streams: tuple[int, ...] = WIDTHS) -> None:
        config = shape(options.layers)
        settings = {"shape": {k: getattr(config, k) for k in DIMENSIONS}, "weights": weights, "streams": streams}
        self.library = Worker(sys.executable, **settings)
        self.cases = {"plain": (self.library, "plain")}
        self.cases |= {f"parscale P={p}": (self.library, f"P={p}") for p in streams}
        self.workers = [self.library]
        if options.released and options.released_python:
            worker = Worker(options.released_python, **settings, checkout=str(Path(options.released).resolve()))
            self.cases |= {f"released P={p}": (worker, f"P={p}") for p in streams}
            self.workers.append(worker)

    def timed(self, rounds: int, do: str, *arguments: Any, only: tuple[int, ...] = WIDTHS) -> dict[str, dict[str, Any]]:
        """Each case's summary, all cases in turn."""
        chosen = {n: c for n, c in self.cases.items() if n == "plain" or int(n.partition("=")[2]) in only}
        times = interleaved({n: w.step(case, do, *arguments) for n, (w, case) in chosen.items()}, rounds, warmup=1)
        return {name: summary(seconds, times["plain"]) for name, seconds in times.items()}

    def floor_ms(self, name: str, context: int, bandwidth: float) -> float:
        """Milliseconds that reading takes at best; the released code must read what this library does."""
        case = "plain" if name in ("plain", "released P=1") else name.partition(" ")[2]
        return round(self.library.run(None, "floor", case, context)["result"] / bandwidth / 1e6, 3)

    def __enter__(self) -> "Codes":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.__exit__()


def decode(codes: Codes, options: argparse.Namespace, weights: str, bandwidth: float) -> list[dict[str, Any]]:
    """A token at a time behind the prompt, `--new` of them, the cache growing."""
    for worker, case in codes.cases.values():
        worker.run(case, "prefill", options.prompt)
    context = options.prompt + options.new // 2
    return [
        {"phase": "decode", "weights": weights, "case": name, "context": context, **row}
        | {"floor_ms": codes.floor_ms(name, context, bandwidth)}
        for name, row in codes.timed(options.new, "decode").items()
    ]


def prefill(codes: Codes, options: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """Prompts of every length; many rounds for short ones, at least three for long ones."""
    rows = []
    for tokens in options.prefill:
        rounds = max(3, min(options.rounds, options.rounds * 256 // tokens))
        for name, row in codes.timed(rounds, "prefill", tokens, only=(1, 8)).items():
            floor = codes.floor_ms(name, tokens, bandwidth)
            rows.append({"phase": "prefill", "case": name, "tokens": tokens, **row, "floor_ms": floor})
            print(rows[-1], flush=True)
    return rows


def contexts(codes: Codes, options: argparse.Namespace, bandwidth: float) -> list[dict[str, Any]]:
    """One token on a long cache: its time, and what the operations make anew. A dynamic cache grows by copying itself,
    once a token; a static one does not, so all that is as large as a layer's keys would be a copy of ours."""
    rows = []
    for context in options.contexts:
        for static in (False, True):
            cases = {n: c for n, c in codes.cases.items() if not (static and n.startswith("released"))}
            for name in [n for n in cases if n == "plain" or n.endswith(("=1", "=8"))]:
                worker, case = cases[name]
                worker.run(case, "fill", context, static)
                times = interleaved({name: worker.step(case, "decode")}, options.rounds, warmup=1)[name]
                row = {k: v for k, v in summary(times, times).items() if k != "ratio"}
                made = {k: round(v, 3) for k, v in worker.run(case, "allocated")["result"].items()}
                about = {
                    "phase": "context",
                    "case": name,
                    "context": context,
                    "cache": "static" if static else "dynamic",
                }
                rows.append(about | row | {"floor_ms": codes.floor_ms(name, context, bandwidth)} | made)
                print(rows[-1], flush=True)
                worker.run(case, "prefill", 2)  # lets go of the long cache
    return rows


def peak(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The most memory that a process holds while it continues the prompt; a new process for every row."""
    rows = []
    for p in (1, 8):
        with Codes(options, "bfloat16", streams=(p,)) as codes:
            for name, (worker, case) in codes.cases.items():
                if name == "plain" and p > 1:
                    continue
                held = {
                    k: round(v, 1) for k, v in worker.run(case, "peak", options.prompt, options.new)["result"].items()
                }
                rows.append({"phase": "memory", "case": name, "prompt": options.prompt, "new": options.new} | held)
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--released", help="folder of the authors' code")
    arguments.add_argument("--released-python", help="interpreter with transformers 4.53.3")
    arguments.add_argument("--layers", type=int, default=36)
    arguments.add_argument("--prompt", type=int, default=256, help="tokens")
    arguments.add_argument("--new", type=int, default=64, help="tokens decoded, each timed")
    arguments.add_argument("--rounds", type=int, default=15, help="prefills timed up to 256 tokens; fewer beyond")
    arguments.add_argument("--prefill", type=int, nargs="*", default=[16, 32, 64, 128, 256, 512, 1024, 2048])
    arguments.add_argument("--contexts", type=int, nargs="*", default=[4096, 16384])
    arguments.add_argument("--weights", nargs="*", default=["bfloat16", "float32", "int8", "int4"])
    arguments.add_argument("--name", default="generate")
    options = arguments.parse_args()
    places = {options.released: "CHECKOUT", options.released_python: "PYTHON"}  # of this machine: nobody else's
    sys.argv = [places.get(argument, argument) for argument in sys.argv]
    settings = {
        name: places.get(value, value) if isinstance(value, str) else value for name, value in vars(options).items()
    }
    rows: list[dict[str, Any]] = []
    for weights in options.weights:
        with Codes(options, weights) as codes:
            bandwidth = codes.library.run(None, "bandwidth")["result"]
            settings.setdefault("bandwidth_gb_s", {})[weights] = round(bandwidth, 2)
            rows += decode(codes, options, weights, bandwidth)
            print(*rows, sep="\n", flush=True)
            if weights == "bfloat16":
                rows += prefill(codes, options, bandwidth)
                rows += contexts(codes, options, bandwidth)
        write(options.name, settings, rows)
    rows += peak(options)
    print(write(options.name, settings, rows))


if __name__ == "__main__":
    main()
