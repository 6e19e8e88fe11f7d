"""What the tests of faults and of several processes run in processes of their own."""

import json
import os
import resource
import signal
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from parscale.config import StreamsConfig
from parscale.train import checkpoints
from parscale.train.config import TrainConfig
from parscale.train.parallel import split_streams
from parscale.train.trainer import StreamsTrainer, train
from tests import small

STREAMS = StreamsConfig(2, 4, diversify=("prefix", "embedding"))


def run_of(output: Path, corpus: Path, **changes: Any) -> TrainConfig:
    """Twelve steps of stage 2 on a small model; a checkpoint every three."""
    settings: dict[str, Any] = {
        "data": (str(corpus),), "cache_dir": corpus.parent / "cache", "streams": STREAMS, "tokens": 12 * 4 * 16,
        "batch_size": 4, "block_size": 16, "validation_blocks": 4, "evaluations": 1, "save_every": 3,
    }  # fmt: skip
    return TrainConfig("retrofit", output, **settings | changes)


def train_until(config: TrainConfig, step: int | None = None, place: str = "step") -> None:
    """Train, and die at a step: before its forward pass, or half-way through writing a checkpoint."""
    if step is not None:
        _at(step, place, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train(config)


def train_until_told_to_stop(config: TrainConfig, step: int, told: Path) -> None:
    """Train, and get SIGTERM in a step; what is printed as an error goes into `told`."""
    _at(step, "step", lambda: signal.raise_signal(signal.SIGTERM))
    sys.argv = ["/venv/bin/parscale", "train", "retrofit", "--output", "my run"]
    with told.open("w") as file, redirect_stderr(file):
        train(config)


def train_with_equal_losses(config: TrainConfig, steps: Path, stop: int | None = None) -> None:
    """Train where every evaluation gives the same loss, and maybe get SIGTERM in a step; `steps` gets how many ran."""

    def evaluate(self: StreamsTrainer, *args: Any, **kwargs: Any) -> dict[str, float]:
        metrics = {"eval_loss": 5.0}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    StreamsTrainer.evaluate = evaluate  # type: ignore[method-assign]
    if stop is not None:
        _at(stop, "step", lambda: signal.raise_signal(signal.SIGTERM))
    steps.write_text(str(train(config).steps))


def train_on_a_full_disk(config: TrainConfig, step: int, error: Path) -> None:
    """Train; from a step on no file may grow beyond 4 KiB."""
    _at(step, "step", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)))
    try:
        train(config)
    except checkpoints.InputError as refused:
        error.write_text(str(refused))
        raise SystemExit(2) from None


def train_and_record(config: TrainConfig, record: Path) -> None:
    """Train; process 0 writes the losses of every log."""
    result = train(config)
    if os.environ.get("RANK", "0") == "0":
        record.write_text(json.dumps({"history": result.history, "start": result.start_loss}))


def _at(step: int, place: str, action: Any) -> None:
    """Let `action` happen in the given training step of this process, or in its given writing of a checkpoint."""
    owner, name = (StreamsTrainer, "training_step") if place == "step" else (checkpoints, "publish")
    original, calls = getattr(owner, name), 0

    def with_action(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, with_action)


def save_stream_gradients(size: int, file: Path, **streams: Any) -> None:
    """Process 0 writes the gradients of one step of all processes, `size` of which share the streams of a batch."""
    dist.init_process_group("gloo")
    model = small.with_streams(small.build().double(), **streams)
    mesh = split_streams(model, size)
    wrapped = DistributedDataParallel(model)
    ids = stream_batch().chunk(mesh["data"].size())[mesh["data"].get_local_rank()]
    wrapped(input_ids=ids, labels=ids).loss.backward()
    if dist.get_rank() == 0:
        save_file({name: p.grad for name, p in model.named_parameters()}, file)
    dist.destroy_process_group()


def stream_batch() -> torch.Tensor:
    return torch.randint(small.VOCABULARY, (4, 11), generator=torch.Generator().manual_seed(3))
