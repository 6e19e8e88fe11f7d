"""What tells streams apart best? Stage 2 of a small model on real text, one row a setting and seed, resumable.

    python benchmarks/diversity.py --seeds 0 1 2                    # all settings
    python benchmarks/diversity.py --settings control P=4/lora      # some

Every row continues the seed's own base model with the same tokens in the same order, at the demo's sizes and rates.
Rows that `results/diversity.jsonl` holds already are not run again.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from record import RESULTS

from parscale.config import StreamsConfig
from parscale.experiments.demo import SETTINGS, machine
from parscale.train.config import TrainConfig
from parscale.train.data import load_text
from parscale.train.trainer import train

STREAMS = {
    "control": StreamsConfig(1),
    "P=4/prefix": StreamsConfig(4),
    "P=4/prefix+lora": StreamsConfig(4, diversify=("prefix", "lora")),
    "control/lora32": StreamsConfig(1, diversify=("prefix", "lora"), lora_rank=32),
    "P=2/prefix+lora": StreamsConfig(2, diversify=("prefix", "lora")),
    "P=4/prefix+embedding": StreamsConfig(4, diversify=("prefix", "embedding")),
    "P=4/prefix+rank1": StreamsConfig(4, diversify=("prefix", "rank1")),
    "control/near_identity": StreamsConfig(1, prefix_init="near_identity"),
    "P=4/prefix near_identity": StreamsConfig(4, prefix_init="near_identity"),
    "control/reparameterized": StreamsConfig(1, prefix_init="reparameterized"),
    "P=4/prefix reparameterized": StreamsConfig(4, prefix_init="reparameterized"),
    "P=8/prefix+lora": StreamsConfig(8, diversify=("prefix", "lora")),
    "P=4/lora, no prefix": StreamsConfig(4, prefix_tokens=0, diversify=("lora",)),
    "P=4/prefix+lora, mean": StreamsConfig(4, diversify=("prefix", "lora"), aggregate="mean"),
    "P=4/prefix+lora near_identity": StreamsConfig(4, diversify=("prefix", "lora"), prefix_init="near_identity"),
    "P=4/prefix+embedding+lora": StreamsConfig(4, diversify=("prefix", "embedding", "lora")),
    "P=4/prefix+lora rank 2": StreamsConfig(4, diversify=("prefix", "lora"), lora_rank=2),
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--settings", nargs="+", default=list(STREAMS), choices=list(STREAMS), metavar="NAME")
    arguments.add_argument("--scale", default="cpu", choices=list(SETTINGS))
    arguments.add_argument("--work", type=Path, default=Path("runs/diversity"), help="folder of the base models")
    options = arguments.parse_args()
    path = RESULTS / "diversity.jsonl"
    done = {(row["setting"], row["seed"], row["scale"]) for row in _rows(path)}
    setting = SETTINGS[options.scale]
    text = load_text(vocab_size=setting.vocab_size, block_size=setting.block_size)
    common = {
        "batch_size": setting.batch_size,
        "block_size": setting.block_size,
        "learning_rate": setting.learning_rate,
        "stream_learning_rate": setting.stream_learning_rate,
    }
    for seed in options.seeds:
        base = options.work / f"{options.scale}-{seed}"
        if not base.exists():
            plain = StreamsConfig(1, 0)
            train(
                TrainConfig(
                    "pretrain", base, setting.model, plain, tokens=setting.base_tokens, decay=0.0, seed=seed, **common
                ),
                data=text,
                title=f"base {seed}",
            )
        for name in options.settings:
            if (name, seed, options.scale) in done:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                result = train(
                    TrainConfig(
                        "retrofit",
                        Path(scratch) / "out",
                        str(base),
                        STREAMS[name],
                        tokens=setting.tokens,
                        decay=0.5,
                        seed=seed,
                        **common,
                    ),
                    data=text,
                    title=f"{name} {seed}",
                )
            row = {
                "setting": name,
                "seed": seed,
                "scale": options.scale,
                "tokens": result.tokens,
                "start_loss": round(result.start_loss, 4),
                "validation_loss": round(result.validation_loss, 4),
                "stream_parameters": result.stream_parameters,
                "at_100_steps": _after(result.history, 100),
                "probe": result.probe,
                "seconds": round(result.seconds, 1),
                "machine": machine(),
            }
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _after(history: list[dict], step: int) -> dict:
    """The first training log from `step` on: gradient norms by parameter group, and the streams' cosine."""
    row = next(row for row in history if row["step"] >= step and "loss" in row)
    wanted = ("step", "streams/cosine", "streams/effective", "gradients/streams", "gradients/backbone")
    return {name: round(row[name], 5) for name in wanted if name in row}


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
