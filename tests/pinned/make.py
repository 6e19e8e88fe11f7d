"""Writes what a change of structure must not change: saved models, a run that was cut off, and trained weights.

    python -m tests.pinned.make           write `models/`, `run/` and `trained.json` beside this file
    python -m tests.pinned.make --check   compare bit by bit with what is there, on the machine that wrote it

Made once, by the last version before a change of structure, and not again by that change.
"""

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import parscale
from parscale import StreamsConfig
from parscale.load import load_model
from parscale.train.config import TrainConfig
from parscale.train.trainer import StreamsTrainer, train

HERE = Path(__file__).parent
LICENSE = HERE.parent.parent / "LICENSE"
VOCABULARY, NEW, P = 29, 6, 3
STEPS, BATCH, BLOCK = 20, 4, 32

TINY: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    "initializer_range": 0.3, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gpt2": {
        "n_embd": 16,
        "n_inner": 8,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 32,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
}
DIVERSIFIERS: dict[str, dict[str, Any]] = {
    "prefix": {"diversify": ("prefix",)},
    "embedding": {"diversify": ("embedding",), "prefix_tokens": 0},
    "lora": {"diversify": ("prefix", "lora"), "lora_rank": 2},
    "rank1": {"diversify": ("rank1",), "prefix_tokens": 0},
}
CASES = [(family, kv, name) for family in FAMILIES for kv in ("own", "shared") for name in DIVERSIFIERS]


def base_model(family: str) -> Any:
    torch.manual_seed(1)
    config = AutoConfig.for_model(family, **(TINY | FAMILIES[family]))
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def with_streams(model: Any, kv: str, diversifier: str) -> Any:
    """Streams that differ, and a head whose weights depend on the token."""
    torch.manual_seed(2)
    settings: dict[str, Any] = {"streams": P, "prefix_tokens": 3, "kv": kv} | DIVERSIFIERS[diversifier]
    parscale.parallelize(model, StreamsConfig(**settings))
    for name, parameter in model.named_parameters():
        if "aggregate_layer" in name or name.endswith("stream_lora_b"):
            parameter.data.normal_(std=0.3)
        elif "stream_scale" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def answers(model: Any) -> dict[str, torch.Tensor]:
    """Logits, greedy tokens, and the shape of each layer's keys in the cache."""
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    out = model(ids, attention_mask=mask)
    tokens = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    shapes = [list(layer.keys.shape) for layer in out.past_key_values.layers]
    return {"logits": out.logits, "tokens": tokens, "cache_shapes": torch.tensor(shapes)}


def make_models(folder: Path) -> None:
    for family in FAMILIES:
        base = folder / family
        base_model(family).save_pretrained(base)
        for of, kv, diversifier in CASES:
            if of == family:
                model = with_streams(AutoModelForCausalLM.from_pretrained(base).eval(), kv, diversifier)
                model.name_or_path = family  # adapters name their base: not by where this checkout lies
                name = f"{family}-{kv}-{diversifier}"
                parscale.save_streams(model, folder / "adapters" / name)
                model.save_pretrained(folder / "whole" / name)
                save_file(answers(model), folder / "whole" / name / "reference.safetensors")


def run_of(stage: str, output: str, **changes: Any) -> TrainConfig:
    """Twenty steps of a stage, in the folder that holds `license.txt` and `chats.jsonl`."""
    settings: dict[str, Any] = {
        "model": "pico" if stage == "pretrain" else "base", "vocab_size": 300, "block_size": BLOCK, "batch_size": BATCH,
        "data": ("chats.jsonl",) if stage == "sft" else ("license.txt",), "cache_dir": Path("cache"), "evaluations": 2,
        "tokens": None if stage == "sft" else STEPS * BATCH * BLOCK, "validation_blocks": 4,
        "streams": StreamsConfig(2, 4, diversify=("prefix", "lora"), lora_rank=2),
    }  # fmt: skip
    if stage == "sft":
        settings |= {"chat_template": "plain", "block_size": 16, "tokens": STEPS * BATCH * 16}
    return TrainConfig(stage, Path(output), **settings | changes)  # type: ignore[arg-type]


def write_texts() -> None:
    """In this folder: the licence of this library, and questions with answers."""
    shutil.copy(LICENSE, "license.txt")
    chats = [{"prompt": f"{a} and {b} is", "completion": f" {a + b}."} for a in range(9) for b in range(9)]
    Path("chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))


def trained() -> dict[str, dict[str, Any]]:
    """Of each stage: the hash of all final weights, and the norm of each."""
    found = {}
    train(run_of("pretrain", "base", streams=StreamsConfig(1, 0)))
    for stage in ("pretrain", "retrofit", "frozen", "sft"):
        train(run_of(stage, stage))
        found[stage] = told(Path(stage))
    return found


def told(folder: Path) -> dict[str, Any]:
    weights = sorted(load_file(folder / "model.safetensors").items())
    digest = hashlib.sha256(b"".join(name.encode() + w.numpy().tobytes() for name, w in weights)).hexdigest()
    return {"sha256": digest, "norms": {name: w.double().norm().item() for name, w in weights}}


def cut_off() -> None:
    """A run of stage 2 that is killed in its thirteenth step: a checkpoint every five."""
    before = StreamsTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 12:
            os.kill(os.getpid(), signal.SIGKILL)
        return before(self, *args, **kwargs)

    StreamsTrainer.training_step = step  # type: ignore[method-assign]
    train(run_of("retrofit", "run", save_every=5, keep=1))


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--cut-off", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.cut_off:
        cut_off()
    if args.check:
        check()
        return
    shutil.rmtree(HERE / "models", ignore_errors=True)
    shutil.rmtree(HERE / "run", ignore_errors=True)
    make_models(HERE / "models")
    with tempfile.TemporaryDirectory() as work, in_folder(Path(work)):
        write_texts()
        (HERE / "trained.json").write_text(json.dumps(trained(), indent=1) + "\n")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent.parent), *sys.path])}
        killed = subprocess.run([sys.executable, "-m", "tests.pinned.make", "--cut-off"], env=environment)
        assert killed.returncode == -signal.SIGKILL
        shutil.copytree("run", HERE / "run" / "run")
        shutil.copytree("base", HERE / "run" / "base")
        train(run_of("retrofit", "run", save_every=5, keep=1, resume=True))
        (HERE / "run" / "resumed.json").write_text(json.dumps(told(Path("run")), indent=1) + "\n")


def check() -> None:
    for family, kv, diversifier in CASES:
        folder = HERE / "models" / "whole" / f"{family}-{kv}-{diversifier}"
        reference, found = load_file(folder / "reference.safetensors"), answers(load_model(folder).eval())
        same = all(torch.equal(reference[name], found[name]) for name in reference)
        print("same" if same else "DIFFERENT", folder.name)
    with tempfile.TemporaryDirectory() as work, in_folder(Path(work)):
        write_texts()
        before, now = json.loads((HERE / "trained.json").read_text()), trained()
        for stage in before:
            print("same" if before[stage]["sha256"] == now[stage]["sha256"] else "DIFFERENT", stage)


if __name__ == "__main__":
    main()
