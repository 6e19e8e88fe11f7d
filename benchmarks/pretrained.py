"""Streams against one LoRA on a frozen pretrained model (a folder, hub name or GGUF file): one row a run, resumable.

    python benchmarks/pretrained.py --model FILE.gguf --data law=TRAIN.jsonl.zst,VALIDATION.jsonl.zst --runs lora-0.003

Every run sees the same blocks in the same order for a seed. Losses are nats per token on the same held-out blocks.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from record import RESULTS
from safetensors.torch import load_file, save_file
from torch import Tensor

import parscale
from parscale.experiments.demo import machine
from parscale.load import load_model, load_tokenizer
from parscale.probe import probe_streams
from parscale.streams.tensors import belongs_to_streams
from parscale.train.balance import load_imbalance
from parscale.train.config import Rates
from parscale.train.data import load_text
from parscale.train.loss import chunked_loss
from parscale.train.stages import parameter_groups
from parscale.utils.files import write_text

LORA = {"streams": 1, "prefix_tokens": 0, "diversify": ("lora",)}
STREAMS = {"streams": 4, "diversify": ("prefix", "lora"), "prefix_init": "near_identity", "lora_rank": 8}


@dataclass(frozen=True)
class Run:
    """What a run trains, and how. `start` names the run whose factors it begins with, split with `noise`."""

    streams: dict[str, Any]
    rate: float = 1e-3
    head_rate: float = 1.0
    load_balance: float = 0.0
    text_tokens: int | None = None
    """Of the text, passed over again and again; None is all of it."""
    start: str = ""
    noise: float = 0.0
    tokens_share: float = 1.0
    """Of `--tokens`: a run that continues another has what that one left."""


def _runs() -> dict[str, Run]:
    shared, slow = STREAMS | {"kv": "shared"}, {"rate": 3e-3, "head_rate": 0.1}
    even = slow | {"load_balance": 0.01}
    split = {"streams": 4, "prefix_tokens": 0, "diversify": ("lora",), "lora_rank": 32, "kv": "shared"}
    runs = {
        "control": Run(STREAMS | {"streams": 1}, **slow),
        "p4-shared-slow": Run(shared, **slow),
        "p4-shared-slow-even": Run(shared, **even),
        "p4-own-slow-even": Run(STREAMS, **even),
        "p4-own": Run(STREAMS, rate=3e-3),
        "p4-shared-mean": Run(shared | {"aggregate": "mean"}, rate=3e-3),
        "p4-own-mean": Run(STREAMS | {"aggregate": "mean"}, rate=3e-3),
        "p4-shared-rank-32": Run(shared | {"lora_rank": 32}, **slow),
        "p4-own-rank-32": Run(STREAMS | {"lora_rank": 32}, **slow),
        "p4-text-prefix": Run(STREAMS | {"prefix_init": "text"}, **slow),
        "p4-lora-own": Run(split | {"kv": "own", "lora_rank": 8}, **slow),
        "half-lora": Run(LORA | {"lora_rank": 32}, rate=3e-3, tokens_share=0.5),
        "lora-again": Run(LORA | {"lora_rank": 32}, rate=3e-3, start="half-lora", tokens_share=0.5),
        "p4-split": Run(split, rate=1e-3, head_rate=0.1, start="half-lora", noise=0.3, tokens_share=0.5),
        "p4-split-3e-3": Run(split, **slow, start="half-lora", noise=0.3, tokens_share=0.5),
        "p2-own": Run(STREAMS | {"streams": 2}, **slow),
        "p8-own": Run(STREAMS | {"streams": 8}, **slow),
    }
    for rate in (3e-4, 1e-3, 3e-3, 1e-2):
        runs[f"lora-{rate:g}"] = Run(LORA | {"lora_rank": 32}, rate=rate)
        runs[f"p4-shared-{rate:g}"] = Run(shared, rate=rate)
        runs[f"lora-8-{rate:g}"] = Run(LORA | {"lora_rank": 8}, rate=rate)
    for name in ("lora-0.001", "lora-0.003", "p4-shared-0.003", "p4-shared-slow-even", "p4-own-slow-even"):
        runs[f"{name}-little"] = Run(**asdict(runs[name]) | {"text_tokens": 12_288})
    return runs


RUNS = _runs()


def build(run: Run, base: str, calibration: Tensor, seed: int, started: Path | None) -> Any:
    torch.manual_seed(seed)
    model = load_model(base, dtype=torch.bfloat16)
    parscale.parallelize(model, parscale.StreamsConfig(**run.streams), calibration=calibration)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs_to_streams(name))
        if parameter.requires_grad:  # small steps would round away in bfloat16
            parameter.data = parameter.data.float()
    if started is not None:
        split_factors(model, load_file(started), run.noise, torch.Generator().manual_seed(seed))
    return model


@torch.no_grad()
def split_factors(model: Any, trained: dict[str, Tensor], noise: float, generator: torch.Generator) -> None:
    """Every stream begins with the trained factors; B gets noise of `noise` times its own spread, and the noise of all
    streams sums to zero, so that their mean starts near the trained model."""
    for name, parameter in model.named_parameters():
        if name in trained:
            own = trained[name][:1].expand_as(parameter).clone()
            if name.endswith("stream_lora_b"):
                drawn = torch.randn(own.shape, generator=generator) * own.std() * noise
                own += drawn - drawn.mean(0)
            parameter.copy_(own)


def batches(blocks: Tensor, steps: int, batch: int, seed: int) -> list[Tensor]:
    """(batch, T) for every step: whole passes over the blocks, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-steps * batch // len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(passes)])
    return [blocks[order[i * batch : (i + 1) * batch]] for i in range(steps)]


@torch.no_grad()
def evaluate(model: Any, blocks: Tensor) -> list[float]:
    """Mean nats per token of each block."""
    model.eval()
    losses = [model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in blocks]
    model.train()
    return losses


def rate_at(step: int, steps: int) -> float:
    """Warm-up over a twentieth, then half a cosine to zero."""
    warm = max(1, steps // 20)
    return (step + 1) / warm if step < warm else 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


class Training:
    """A model, its optimizer and what was seen so far; what is in `folder` goes on."""

    def __init__(self, model: Any, run: Run, folder: Path) -> None:
        self.model, self.run, self.folder = model, run, folder
        groups = parameter_groups(model, Rates(run.rate, run.rate, 0.0, head_rate=run.head_rate))
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.peak = [group["lr"] for group in self.optimizer.param_groups]
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.seen: list[Tensor] = []
        self.state: dict[str, Any] = {"step": 0, "seconds": 0.0, "curve": [], "train": []}
        if (folder / "state.json").exists():
            self._read()

    def step(self, batch: Tensor, steps: int) -> None:
        begun = time.perf_counter()
        for group, rate in zip(self.optimizer.param_groups, self.peak, strict=True):
            group["lr"] = rate * rate_at(self.state["step"], steps)
        with self.model.base_model.stream_state.using(observer=self._observe if self.run.load_balance else None):
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        self.state["train"].append(round(loss.item(), 4))
        (loss + self.seen.pop() if self.seen else loss).backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state["step"] += 1
        self.state["seconds"] += time.perf_counter() - begun

    def save(self) -> None:
        """The tensors first: what `state.json` names is always whole."""
        held = {name: p.data for name, p in self.trained.items()}
        for name, p in self.trained.items():
            held |= {
                f"m.{name}": self.optimizer.state[p]["exp_avg"],
                f"v.{name}": self.optimizer.state[p]["exp_avg_sq"],
            }
        file = self.folder / f"state-{self.state['step']}.safetensors"
        save_file(held, file)
        write_text(self.folder / "state.json", json.dumps(self.state))
        for old in set(self.folder.glob("state-*.safetensors")) - {file}:
            old.unlink()

    def _read(self) -> None:
        self.state = json.loads((self.folder / "state.json").read_text())
        held = load_file(self.folder / f"state-{self.state['step']}.safetensors")
        for name, p in self.trained.items():
            p.data.copy_(held[name])
            moments = {"exp_avg": held[f"m.{name}"], "exp_avg_sq": held[f"v.{name}"]}
            self.optimizer.state[p] = {"step": torch.tensor(float(self.state["step"])), **moments}

    def _observe(self, hidden: Tensor, weights: Tensor) -> None:
        if torch.is_grad_enabled() and hidden.shape[0] > 1:
            self.seen.append(self.run.load_balance * load_imbalance(weights))


def perform(name: str, args: argparse.Namespace, blocks: Tensor, held_out: Tensor) -> dict[str, Any]:
    """Train one run and look at its model: its row."""
    run = RUNS[name]
    blocks = blocks[: run.text_tokens // args.block] if run.text_tokens else blocks
    all_steps = args.tokens // (args.batch * args.block)
    steps = round(all_steps * run.tokens_share)
    folders = {of: args.work / f"{of}-{args.seed}-{args.tokens}-{args.domain}" for of in (name, run.start)}
    folders[name].mkdir(parents=True, exist_ok=True)
    started = folders[run.start] / "final.safetensors" if run.start else None
    model = build(run, args.model, blocks[:4], args.seed, started)
    training = Training(model, run, folders[name])
    todo = batches(blocks, all_steps, args.batch, args.seed)[all_steps - steps if run.start else 0 :][:steps]
    with chunked_loss(model):
        curve = training.state["curve"]
        if not curve:
            curve.append([0, statistics.mean(evaluate(model, held_out[:16]))])
        for batch in todo[training.state["step"] :]:
            training.step(batch, steps)
            step = training.state["step"]
            if step % args.save_every == 0:
                if step % (2 * args.save_every) == 0 and step < steps:
                    curve.append([step, statistics.mean(evaluate(model, held_out[:16]))])
                training.save()
                print(f"{name} {step}/{steps} held out {curve[-1]} {training.state['seconds']:.0f} s", flush=True)
        losses = evaluate(model, held_out)
    save_file({n: p.data for n, p in training.trained.items()}, folders[name] / "final.safetensors")
    for old in folders[name].glob("state-*.safetensors"):
        old.unlink()
    row = {
        "run": name, "seed": args.seed, "domain": args.domain, "budget": args.tokens, "steps": steps,
        "tokens": steps * args.batch * args.block, "settings": asdict(run),
        "parameters": sum(p.numel() for p in training.trained.values()), "loss": statistics.mean(losses),
        "losses": [round(x, 5) for x in losses], "curve": curve, "train": training.state["train"],
        "seconds": round(training.state["seconds"]), "machine": machine(),
    }  # fmt: skip
    if run.streams["streams"] > 1:
        probe = probe_streams(model.eval(), held_out[:8])
        told = ("weights", "stream_losses", "cosine", "effective_streams")
        row["probe"] = {field: getattr(probe, field) for field in told}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, help="NAME=TRAIN,VALIDATION")
    parser.add_argument("--runs", nargs="+", required=True, choices=sorted(RUNS))
    parser.add_argument("--tokens", type=int, default=61_440)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=48)
    parser.add_argument("--save-every", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("runs/pretrained"))
    parser.add_argument("--results", type=Path, default=RESULTS / "pretrained.jsonl")
    args = parser.parse_args()
    args.domain, sources = args.data.split("=")
    source, validation = sources.split(",")
    text = load_text(
        [source],
        validation=[validation],
        tokenizer=load_tokenizer(args.model),
        block_size=args.block,
        max_train_tokens=2_000_000,
    )
    blocks = [torch.as_tensor(part["input_ids"]) for part in (text.train[:4000], text.validation[: args.held_out])]
    held = args.results.read_text().splitlines() if args.results.exists() else []
    done = {(row["run"], row["seed"], row["domain"], row["budget"]) for row in map(json.loads, held)}
    for name in args.runs:
        if (name, args.seed, args.domain, args.tokens) in done:
            continue
        row = perform(name, args, *blocks)
        with args.results.open("a") as out:
            out.write(json.dumps(row) + "\n")
        print(f"{name}: {row['loss']:.4f} {row.get('probe', {}).get('weights')}", flush=True)


if __name__ == "__main__":
    main()
