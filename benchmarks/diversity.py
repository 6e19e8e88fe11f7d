"""What tells streams apart best, and does it pay? Small models on real text, one row a setting and seed, resumable.

    python benchmarks/diversity.py                                             # stage 2, the main settings, three seeds
    python benchmarks/diversity.py --stage pretrain frozen --settings control "P=4/prefix+lora" --seeds 0 1 2
    python benchmarks/diversity.py --data novels/ --corpus prose --model nano  # another text, another size

Every row of one stage, model, text and seed sees the same tokens in the same order; retrofit and frozen continue the
seed's own base model. Sizes and rates are the demo's. Rows that `results/diversity.jsonl` holds are not run again; a
killed sweep goes on.
"""

import argparse
import json
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from record import RESULTS

from parscale.config import StreamsConfig
from parscale.experiments.demo import SETTINGS, machine
from parscale.train.config import Balance, TrainConfig
from parscale.train.data import load_text
from parscale.train.trainer import train

BOTH: Any = ("prefix", "lora")
STAGES = ("pretrain", "retrofit", "frozen")
REMEDIED = ("P=4/prefix", "P=2/prefix+lora", "P=4/prefix+lora", "P=8/prefix+lora", "P=4/shared", "P=8/shared")
"""Settings that are also run with each remedy."""


@dataclass(frozen=True)
class Run:
    """One setting: the streams, what keeps them apart in training, and what else differs from the demo's settings."""

    streams: StreamsConfig
    balance: Balance = field(default_factory=Balance)
    rates: dict[str, float] = field(default_factory=dict)
    passes: int = 1
    """Times the tokens of the others: with P = 1, as much compute as so many streams."""


def _runs() -> dict[str, Run]:
    lora, shared = {"diversify": BOTH}, {"diversify": BOTH, "kv": "shared"}
    configs: dict[str, StreamsConfig] = {
        "control": StreamsConfig(1),
        "control/lora32": StreamsConfig(1, diversify=BOTH, lora_rank=32),
        "P=4/prefix": StreamsConfig(4),
        "P=2/prefix+lora": StreamsConfig(2, **lora),
        "P=4/prefix+lora": StreamsConfig(4, **lora),
        "P=8/prefix+lora": StreamsConfig(8, **lora),
        "P=2/shared": StreamsConfig(2, **shared),
        "P=4/shared": StreamsConfig(4, **shared),
        "P=8/shared": StreamsConfig(8, **shared),
        "P=4/shared, one prefix": StreamsConfig(4, **shared, shared_prefix=True),
        "P=4/shared, no prefix": StreamsConfig(4, 0, diversify=("lora",), kv="shared"),
        "P=4/shared, prefix alone": StreamsConfig(4, kv="shared"),
        "P=4/shared, prefix+embedding": StreamsConfig(4, diversify=("prefix", "embedding"), kv="shared"),
        "P=4/shared, prefix+rank1": StreamsConfig(4, diversify=("prefix", "rank1"), kv="shared"),
        "P=4/lora, no prefix": StreamsConfig(4, 0, diversify=("lora",)),
        "P=4/prefix+embedding": StreamsConfig(4, diversify=("prefix", "embedding")),
        "P=4/prefix+rank1": StreamsConfig(4, diversify=("prefix", "rank1")),
        "P=4/prefix+embedding+lora": StreamsConfig(4, diversify=("prefix", "embedding", "lora")),
        "P=4/prefix+lora, mean": StreamsConfig(4, **lora, aggregate="mean"),
        "P=4/prefix+lora rank 2": StreamsConfig(4, **lora, lora_rank=2),
        "P=4/prefix+lora near_identity": StreamsConfig(4, **lora, prefix_init="near_identity"),
    }
    for init in ("near_identity", "orthogonal", "text", "reparameterized"):
        configs[f"control/{init}"] = StreamsConfig(1, prefix_init=init)
        configs[f"P=4/prefix {init}"] = StreamsConfig(4, prefix_init=init)
    runs = {name: Run(config) for name, config in configs.items()}
    runs["control, 4 x tokens"] = Run(StreamsConfig(1), passes=4)
    balances = {
        "annealed": Balance(smoothing_start=1.0),
        "load balance": Balance(load_balance=0.01),
        "entropy floor": Balance(entropy_floor=3.0),
        "decorrelation": Balance(decorrelation=0.1),
        "stream dropout": Balance(stream_dropout=0.1),
        "fewer streams": Balance(fewer_streams=0.5),
    }
    for balance, remedy in balances.items():
        for streams in REMEDIED:
            runs[f"{streams}, {balance}"] = Run(configs[streams], remedy)
    for rate in (3e-3, 3e-2):
        for streams in ("P=4/prefix", "P=4/prefix+lora"):
            runs[f"{streams}, stream rate {rate:g}"] = Run(configs[streams], rates={"stream_learning_rate": rate})
    return runs


RUNS = _runs()
FIRST = {
    "stage": "retrofit",
    "model": "pico",
    "corpus": "stdlib",
    "batch_size": 32,
    "learning_rate": 3e-3,
    "stream_learning_rate": 1e-2,
}
"""What the first sweeps' rows do not say of themselves."""
GROUP = ("stage", "model", "corpus", "tokens", "batch_size", "learning_rate", "stream_learning_rate")
"""Rows that are alike in these are compared."""
MAIN = ("control", "control/lora32", "P=4/prefix", "P=2/prefix+lora", "P=4/prefix+lora", "P=8/prefix+lora")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--stage", nargs="+", default=["retrofit"], choices=STAGES)
    arguments.add_argument("--settings", nargs="+", default=list(MAIN), choices=list(RUNS), metavar="NAME")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--scale", default="cpu", choices=list(SETTINGS))
    arguments.add_argument("--model", help="shape of the model; by default the scale's")
    arguments.add_argument("--steps", type=int, help="of pretrain, retrofit or frozen; by default the scale's")
    arguments.add_argument("--learning-rate", type=float, help="by default the scale's")
    arguments.add_argument("--stream-learning-rate", type=float, help="by default the scale's")
    arguments.add_argument("--data", nargs="+", default=["stdlib"], help="text, as for parscale train")
    arguments.add_argument("--corpus", default="stdlib", help="what the text is called in the rows")
    arguments.add_argument("--work", type=Path, default=Path("runs/diversity"), help="folder of the base models")
    arguments.add_argument("--out", type=Path, default=RESULTS / "diversity.jsonl", help="file of the rows")
    arguments.add_argument("--table", action="store_true", help="print the rows as tables, and run nothing")
    options = arguments.parse_args()
    if options.table:
        print_tables(_rows(options.out))
        return
    setting = SETTINGS[options.scale]
    model = options.model or setting.model
    text = load_text(options.data, vocab_size=setting.vocab_size, block_size=setting.block_size)
    step = setting.batch_size * setting.block_size
    tokens = {"pretrain": setting.base_tokens, "retrofit": setting.tokens, "frozen": setting.tokens}
    if options.steps:
        tokens = dict.fromkeys(tokens, options.steps * step)
    done = {_key(row) for row in _rows(options.out)}
    for seed in options.seeds:
        common: dict[str, Any] = {
            "batch_size": setting.batch_size,
            "block_size": setting.block_size,
            "learning_rate": options.learning_rate or setting.learning_rate,
            "stream_learning_rate": options.stream_learning_rate or setting.stream_learning_rate,
            "seed": seed,
        }
        for stage in options.stage:
            start = model
            if stage != "pretrain":
                start = _base(options, model, seed, text, setting.base_tokens, common)
            for name in options.settings:
                about = {"setting": name, "seed": seed, "scale": options.scale, "stage": stage, "model": model}
                about |= {"corpus": options.corpus, "tokens": tokens[stage]}
                about |= {key: common[key] for key in ("batch_size", "learning_rate", "stream_learning_rate")}
                if _key(about) in done:
                    continue
                run = RUNS[name]
                with tempfile.TemporaryDirectory() as scratch:
                    config = TrainConfig(
                        stage,
                        Path(scratch) / "out",
                        str(start),
                        run.streams,
                        balance=run.balance,
                        tokens=tokens[stage] * run.passes,
                        decay=0.5,
                        **common | run.rates,
                    )
                    result = train(config, data=text, title=f"{stage} {name} {seed}")
                row = about | {
                    "start_loss": round(result.start_loss, 4),
                    "validation_loss": round(result.validation_loss, 4),
                    "stream_parameters": result.stream_parameters,
                    "backbone_parameters": result.parameters - result.stream_parameters,
                    "skipped_steps": result.skipped_steps,
                    "curve": [[r["step"], round(r["eval_loss"], 4)] for r in result.history if "eval_loss" in r],
                    "at_100_steps": _after(result.history, 100),
                    "probe": result.probe,
                    "seconds": round(result.seconds, 1),
                    "machine": machine(),
                }
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


def print_tables(rows: list[dict[str, Any]]) -> None:
    """One table for each group of rows that are alike but for setting and seed: losses, gains over the control of the
    same seed, and how many of the control's standard deviations (over seeds) the mean gain is."""
    groups: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in rows:
        group = tuple((FIRST | row)[k] for k in GROUP)
        groups.setdefault(group, {}).setdefault(row["setting"], {})[row["seed"]] = row
    for (stage, model, corpus, tokens, batch, rate, stream_rate), settings in groups.items():
        controls = {seed: row["validation_loss"] for seed, row in settings.get("control", {}).items()}
        spread = statistics.stdev(controls.values()) if len(controls) > 1 else None
        rates = f"rates {rate:g} and {stream_rate:g}"
        print(f"\n### {stage}, {model}, {corpus}, {tokens / 1e6:.1f} M tokens, {batch} sequences a step, {rates}\n")
        if spread is not None:
            print(f"The control's standard deviation over {len(controls)} seeds is {spread:.4f}.\n")
        print("| setting | seeds | loss | gain by seed | mean gain | in deviations | cosine | effective streams |")
        print("|---|---|---|---|---|---|---|---|")
        for name, seeds in settings.items():
            found = sorted(seeds.items())
            gains = [controls[s] - r["validation_loss"] for s, r in found if s in controls and name != "control"]
            mean = statistics.mean(gains) if gains else None
            probes = [r["probe"] for _, r in found if r["probe"] and r["probe"]["streams"] > 1]
            cells = [
                name,
                " ".join(str(s) for s, _ in found),
                " / ".join(f"{r['validation_loss']:.4f}" for _, r in found),
                " / ".join(f"{g:+.3f}" for g in gains),
                "" if mean is None else f"{mean:+.3f}",
                "" if mean is None or spread is None else f"{mean / spread:.1f}",
                f"{statistics.mean(p['cosine'] for p in probes):.2f}" if probes else "",
                f"{statistics.mean(p['effective_streams'] for p in probes):.1f}" if probes else "",
            ]
            print("| " + " | ".join(cells) + " |")


def _base(options: Any, model: str, seed: int, text: Any, tokens: int, common: dict[str, Any]) -> Path:
    """The plain model that retrofit and frozen continue, trained once for each size, text and seed."""
    rate = f"{common['learning_rate']:g}"
    base = options.work / "-".join((options.scale, model, options.corpus, str(seed), str(common["batch_size"]), rate))
    if not base.exists():
        plain = StreamsConfig(1, 0)
        train(
            TrainConfig("pretrain", base, model, plain, tokens=tokens, decay=0.0, **common),
            data=text,
            title=f"base {seed}",
        )
    return base


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What makes a row this row. Rows of the first sweep, without these entries, are its stage 2."""
    return tuple((FIRST | row)[k] for k in ("setting", "seed", "scale", *GROUP))


def _after(history: list[dict], step: int) -> dict:
    """The first training log from `step` on: gradient norms by parameter group, and the streams' cosine."""
    row = next((row for row in history if row["step"] >= step and "loss" in row), {})
    wanted = ("step", "streams/cosine", "streams/effective", "gradients/streams", "gradients/backbone")
    return {name: round(row[name], 5) for name in wanted if name in row}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
