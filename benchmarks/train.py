"""Training: tokens per second and peak memory, this library beside the naive implementation and the plain model.

    python benchmarks/train.py                       # all rows
    python benchmarks/train.py --minutes 9           # begins no row after nine minutes; the same again goes on

A step is forward, backward, clipping and AdamW, on one batch of random tokens, in float32 weights and bfloat16 products
where the processor has them; on the GPU where there is one. Every row runs in a fresh process, whose largest resident
set, or what it held of the GPU at most, is its peak memory; the rows go round by round, so that a drifting machine is
fair to all. Seconds are those of the fastest step, by the wall clock, or on a CPU with one thread the processor's:
other work on the machine only ever lengthens them. *Naive* is the same model with
its P-fold batch, logits of all positions in one piece, and the LM head in float32; *plain* is the model without
streams, with the chunked loss.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from parscale import StreamsConfig, parallelize
from parscale.train.config import Rates
from parscale.train.loss import chunked_loss
from parscale.train.stages import freeze_backbone, parameter_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FROZEN = 4
"""The P at which frozen is held against the full retrofit."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=2, help="timed steps in each process, after one that is not")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--checkpointing", choices=["off", "on", "both"], default="both")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--name", default="train", help="of the result file")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no row after so many")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark-train.jsonl"), help="those measured so far")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.row:
        print(json.dumps(measure(json.loads(told.row))))
        return
    settings = {name: getattr(told, name) for name in ("layers", "batch", "tokens", "steps", "dtype")}
    checkpointing = {"off": [False], "on": [True], "both": [False, True]}[told.checkpointing]
    rows = cases(told.streams, checkpointing)
    wanted = [row | settings | {"round": number} for number in range(told.rounds) for row in rows]
    found = record.resumed([(row, partial(in_fresh_process, row)) for row in wanted], told.runs, told.minutes)
    seen = [run for run in found if run is not None]
    if len(seen) < len(wanted):
        print(f"{len(seen)} of {len(wanted)} runs are measured; the same command goes on")
        return
    tokens = told.batch * told.tokens
    rows = [row | summary([run for run in seen if row.items() <= run.items()], tokens) for row in rows]
    shape = {"hidden": 896, "intermediate": 4864, "vocabulary": 151936, "optimizer": "AdamW, fused", "prefix": 48}
    settings |= {"rounds": told.rounds}
    path = record.write(told.name, settings | shape | {"clock": _clock()}, rows)
    for line in verdicts(rows):
        print(line)
    print(path)


def cases(streams: list[int], checkpointing: list[bool]) -> list[dict[str, Any]]:
    """Every row that is measured."""
    rows = []
    for saving in checkpointing:
        rows.append({"code": "plain", "streams": 1, "stage": "retrofit", "checkpointing": saving})
        for p in streams:
            for code in ("parscale", "naive"):
                rows.append({"code": code, "streams": p, "stage": "retrofit", "checkpointing": saving})
        if FROZEN in streams:
            rows.append({"code": "parscale", "streams": FROZEN, "stage": "frozen", "checkpointing": saving})
    return rows


def in_fresh_process(row: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, "--row", json.dumps(row)], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise SystemExit(f"{row}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(row: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each timed step, and the most memory that the process ever had, in GiB."""
    model = build(row).to(DEVICE)
    freeze_backbone(model, row["stage"])
    optimizer = torch.optim.AdamW(parameter_groups(model, Rates(1e-4, 1e-3, 0.1)), fused=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    ids = torch.randint(model.config.vocab_size, (row["batch"], row["tokens"]), device=DEVICE)
    seconds, clock = [], time.process_time if _clock() == "processor" else time.perf_counter
    naive = row["code"] == "naive"
    mixed = torch.autocast(DEVICE, torch.bfloat16) if row["dtype"] == "bfloat16" else nullcontext()
    with head_in_float32(model) if naive else chunked_loss(model):
        for _ in range(1 + row["steps"]):
            start = finished(clock)
            with mixed:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(finished(clock) - start)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    peak = torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else held
    return {"seconds": seconds[1:], "peak_gib": peak, "loss": loss.item()}


def finished(clock: Callable[[], float]) -> float:
    """The time at which all that was begun is done."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock()


def _clock() -> str:
    return "processor" if DEVICE == "cpu" and torch.get_num_threads() == 1 else "wall"


def build(row: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=row["layers"],
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with no_init_weights():
        model: Any = Qwen2ForCausalLM(config)
    noise = 0.02 * torch.randn(2**20)  # the same over and over: a start costs as much as a step otherwise
    for name, parameter in model.named_parameters():
        repeated = noise.repeat(-(-parameter.numel() // len(noise)))[: parameter.numel()].view_as(parameter)
        parameter.data.copy_(torch.ones_like(parameter) if "norm" in name else repeated)
    if row["code"] != "plain":
        parallelize(model, StreamsConfig(row["streams"], prefix_init="normal"))
    if row["checkpointing"]:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def head_in_float32(model: Any) -> Any:
    """The LM head outside mixed precision, as long as the process lives."""
    head = model.lm_head

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(DEVICE, enabled=False):
            return nn.functional.linear(hidden.float(), head.weight)

    head.forward = forward
    return nullcontext()


def summary(runs: list[dict[str, Any]], tokens: int) -> dict[str, float]:
    seconds = min(s for run in runs for s in run["seconds"])
    return {
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_gib": round(max(run["peak_gib"] for run in runs), 3),
        "loss": round(runs[0]["loss"], 4),
    }


def verdicts(rows: list[dict[str, Any]]) -> list[str]:
    """The targets, and what was reached."""

    def find(code: str, streams: int, checkpointing: bool, stage: str = "retrofit") -> dict[str, Any]:
        wanted = {"code": code, "streams": streams, "checkpointing": checkpointing, "stage": stage}
        return next(row for row in rows if wanted.items() <= row.items())

    lines = []
    streams = sorted({row["streams"] for row in rows})
    for checkpointing in sorted({row["checkpointing"] for row in rows}):
        told = "with checkpointing" if checkpointing else "without checkpointing"
        one = find("parscale", 1, checkpointing)
        for p in streams:
            ours, naive = find("parscale", p, checkpointing), find("naive", p, checkpointing)
            lines.append(
                f"P={p} {told}: time {ours['seconds'] / one['seconds']:.2f} × P=1, "
                f"speed {naive['seconds'] / ours['seconds']:.2f} × naive, "
                f"memory {ours['peak_gib'] / naive['peak_gib']:.2f} × naive "
                f"and {ours['peak_gib'] / one['peak_gib']:.2f} × P=1"
            )
        if FROZEN in streams:
            full, frozen = find("parscale", FROZEN, checkpointing), find("parscale", FROZEN, checkpointing, "frozen")
            faster = full["seconds"] / frozen["seconds"]
            lines.append(f"frozen P={FROZEN} {told}: {faster:.2f} × as fast as the full retrofit")
    return lines


if __name__ == "__main__":
    main()
