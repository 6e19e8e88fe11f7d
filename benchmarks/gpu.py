"""Streams on a GPU: are they exact in bfloat16, and where do they cost less than the dense model of equal loss?

    python benchmarks/gpu.py --minutes 8    # begins nothing after eight minutes; the same again goes on
    python benchmarks/gpu.py --small        # the same on whatever is there, a CPU too, to try it

*exact*: root mean square error of the logits in bfloat16 against the same weights in float32, over that of the plain
model; and of tokens decoded one by one on a cache, against one pass over all. *prefill* and *decode*: the 1.6 B shape
plain, with 8 streams on their own keys and values (the paper), and on shared ones (a prefix and a LoRA each); and the
dense model of the loss of 8 streams, which lies 0.286 of the way from the 2.8 B to the 4.4 B shape (docs/claim.md). A
decoded token is one CUDA graph, so that the GPU is timed and not Python. What does not fit stands as that.
"""

import argparse
import copy
import functools
import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import interleaved, resumed, spread, write
from transformers import AutoModelForCausalLM, DynamicCache, Qwen2Config, StaticCache

import parscale
from parscale import StreamsConfig
from parscale.cost.model import PAPER_SHAPES
from parscale.experiments.claims.efficiency import FRACTION, LARGE, MIDDLE, SMALL
from parscale.streams.parallelize import over_its_weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STREAMS = (1, 2, 4, 8)
LORA: Any = ("prefix", "lora")
KINDS = {
    "own": StreamsConfig(8, prefix_init="normal"),
    "own+lora": StreamsConfig(8, prefix_init="normal", diversify=LORA),
    "shared+lora": StreamsConfig(8, prefix_init="normal", diversify=LORA, kv="shared"),
}
TIMED = {"plain": (SMALL, None, 0)} | {
    f"{kind} P={p}": (SMALL, kind, p) for kind in ("own", "shared+lora") for p in (1, 2, 4, 8)
}
DENSE = {"2.8B": (MIDDLE, None, 0), "4.4B": (LARGE, None, 0)}
GRID = ("plain", "own P=8", "shared+lora P=8", *DENSE)
"""What is run on every batch and context; the others at the smallest of both."""
ROUNDS, REPLAYS = 5, 10
ROOM = 3 + (1 + ROUNDS) * REPLAYS
"""Tokens that are decoded behind a context."""


@dataclass(frozen=True)
class Setting:
    """What every row is measured at."""

    small: bool
    layers: int
    rounds: int
    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    """In tokens."""


def cases(told: Setting) -> Iterator[tuple[dict[str, Any], Callable[[], dict[str, Any]]]]:
    """Every row: what tells it from the others, and how to get what is measured."""
    for kind in KINDS:
        for p in STREAMS:
            yield {"part": "exact", "case": kind, "streams": p}, lambda kind=kind, p=p: exact(told, kind, p)
    for batch, tokens in ((1, told.contexts[0]), (1, told.contexts[-1]), (told.batches[-1], told.contexts[0])):
        for name in GRID:
            row = {"part": "prefill", "case": name, "batch": batch, "tokens": tokens}
            yield row, lambda n=name, b=batch, t=tokens: prefill(told, n, b, t)
    for batch in told.batches:
        for tokens in told.contexts:
            first = batch == told.batches[0] and tokens == told.contexts[0]
            for name in [*TIMED, *DENSE] if first else GRID:
                row = {"part": "decode", "case": name, "batch": batch, "tokens": tokens}
                yield row, lambda n=name, b=batch, t=tokens: decode(told, n, b, t)


def exact(told: Setting, kind: str, streams: int) -> dict[str, Any]:
    """Errors in bfloat16, as shares of the plain model's own."""
    torch.manual_seed(0)
    wide = plain(SMALL, told, layers=min(8, told.layers), dtype=torch.float32)
    streamed = parscale.parallelize(copy.deepcopy(wide), KINDS[kind])
    if "lora" in KINDS[kind].diversify:
        for name, parameter in streamed.named_parameters():
            if "lora_b" in name:  # zeros, as they start, would leave the streams alike
                torch.nn.init.normal_(parameter, std=0.02)
    streamed.set_streams(streams)
    narrow, narrow_plain = (copy.deepcopy(model).bfloat16() for model in (streamed, wide))
    ids = torch.randint(wide.config.vocab_size, (2, 256 if DEVICE == "cuda" else 32), device=DEVICE)
    half = ids.shape[1] - 16
    truth, plain_truth = streamed(input_ids=ids).logits, wide(input_ids=ids).logits
    of_plain = _rms(narrow_plain(input_ids=ids).logits, plain_truth)
    cache = DynamicCache(config=wide.config)
    narrow(input_ids=ids[:, :half], past_key_values=cache, logits_to_keep=1)
    decoded = torch.cat(
        [
            narrow(input_ids=ids[:, i : i + 1], past_key_values=cache, logits_to_keep=1).logits
            for i in range(half, ids.shape[1])
        ],
        dim=1,
    )
    return {
        "plain_error": _rounded(of_plain),
        "error_over_plain": _rounded(_rms(narrow(input_ids=ids).logits, truth) / of_plain),
        "decoded_error_over_plain": _rounded(_rms(decoded, truth[:, half:]) / of_plain),
    }


def _rms(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.float() - truth).pow(2).mean() / truth.pow(2).mean()).sqrt().item()


def prefill(told: Setting, name: str, batch: int, tokens: int) -> dict[str, Any]:
    model = timed_model(name, told)
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=DEVICE)

    def run() -> None:
        model(input_ids=ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1)

    return spread(interleaved({name: run}, told.rounds, warmup=1)[name])


def decode(told: Setting, name: str, batch: int, tokens: int) -> dict[str, Any]:
    """Of one token behind so many, for each of the batch."""
    model = timed_model(name, told)
    cache = StaticCache(config=model.config, max_cache_len=tokens + ROOM)
    ids = torch.randint(model.config.vocab_size, (batch, 1), device=DEVICE)

    def step() -> None:
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)

    step()  # makes the cache's tensors
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(tokens)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        replay = graph(step)
        found = spread([t / REPLAYS for t in interleaved({name: lambda: _repeat(replay)}, ROUNDS, warmup=1)[name]])
        return found | {"cache_gb": size / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return spread(interleaved({name: step}, told.rounds, warmup=1)[name]) | {"cache_gb": size / 1e9}


def _repeat(run: Callable[[], None]) -> None:
    for _ in range(REPLAYS):
        run()


def graph(step: Callable[[], None]) -> Callable[[], None]:
    """The step as one launch."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # what libraries allocate at first use must not fall into the recording
        step()
        step()
    torch.cuda.current_stream().wait_stream(aside)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        step()
    return recorded.replay


def timed_model(name: str, told: Setting) -> Any:
    size, kind, streams = (TIMED | DENSE)[name]
    model = plain(size, told) if kind is None else with_streams(kind, told)
    if streams:
        model.set_streams(streams)
    return model


@functools.cache
def with_streams(kind: str, told: Setting) -> Any:
    return over_its_weights(plain(SMALL, told), KINDS[kind])


@functools.cache
def plain(size: str, told: Setting, layers: int = 0, dtype: torch.dtype = torch.bfloat16) -> Any:
    """A model of random weights, of a shape of the paper; `--small` has a sixteenth of its width."""
    shape, narrower = PAPER_SHAPES[size], 16 if told.small else 1
    config = Qwen2Config(
        hidden_size=shape.hidden // narrower,
        intermediate_size=shape.intermediate // narrower,
        num_hidden_layers=layers or told.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=8 if told.small else int(shape.head_dim),
        vocab_size=shape.vocab // narrower**2,
        tie_word_embeddings=True,
        max_position_embeddings=told.contexts[-1] + ROOM,
    )
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def _rounded(x: float) -> float:
    return float(f"{x:.4g}")


def fitting(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What it measures, or that it does not fit; and nothing of it left on the GPU."""
    try:
        return run()
    except torch.OutOfMemoryError:
        return {"fits": False}
    finally:
        if DEVICE == "cuda":  # a graph holds its memory until it is collected
            gc.collect()
            torch.cuda.empty_cache()


def table(rows: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Of each batch and length: times over the plain model's, and what the dense model of equal loss adds to it over
    what streams add. Above 1 streams win."""
    times: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            times.setdefault((row["part"], row["batch"], row["tokens"]), {})[row["case"]] = row["ms"]
    for (part, batch, tokens), of in times.items():
        if "plain" not in of:
            continue
        line = {"part": part, "batch": batch, "tokens": tokens, "plain ms": of["plain"]}
        line |= {f"{name} / plain": _rounded(ms / of["plain"]) for name, ms in of.items() if name != "plain"}
        if of.keys() >= DENSE.keys():
            dense = of["2.8B"] + FRACTION * (of["4.4B"] - of["2.8B"])
            line["dense of equal loss / plain"] = _rounded(dense / of["plain"])
            for name in ("own P=8", "shared+lora P=8"):
                if name in of:
                    adds = of[name] - of["plain"]
                    ratio = _rounded((dense - of["plain"]) / adds) if adds > 0 else math.inf
                    line[f"added by dense / by {name}"] = ratio
        yield line


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--small", action="store_true", help="narrow models, two layers, short contexts")
    arguments.add_argument("--layers", type=int, default=36)
    arguments.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    arguments.add_argument("--contexts", type=int, nargs="+", default=[1024, 4096, 16384, 32768], help="tokens")
    arguments.add_argument("--rounds", type=int, default=ROUNDS)
    arguments.add_argument("--minutes", type=float, default=math.inf, help="begin no row after so many")
    arguments.add_argument("--runs", type=Path, default=Path("runs/benchmark-gpu.jsonl"), help="those measured so far")
    arguments.add_argument("--name", default="gpu", help="of the result file")
    options = arguments.parse_args()
    told = Setting(False, options.layers, options.rounds, tuple(options.batches), tuple(options.contexts))
    if options.small:
        told = Setting(True, 2, options.rounds, (1, 4), (64, 256))
    with torch.no_grad():
        wanted = [
            ({"small": told.small, "layers": told.layers} | case, functools.partial(fitting, run))
            for case, run in cases(told)
        ]
        found = resumed(wanted, options.runs, options.minutes)
    rows = [row for row in found if row is not None]
    left = len(found) - len(rows)
    for line in table(rows):
        print(line)
    print(write(options.name, asdict(told), rows))
    if left:
        print(f"{left} rows are not measured; the same command goes on")


if __name__ == "__main__":
    main()
