"""Checkpoints of a run: whole or absent, and enough to go on to the same bits.

Knows what such a folder holds: the trained parameters and the optimizer's state as safetensors, one file a process,
written and read by `torch.distributed.checkpoint`, so that any number of processes, sharded or not, can read what any
other number wrote; the schedule, the run's settings and the random generators as JSON. Nothing in it is a pickle.
"""

import base64
import hashlib
import json
import random
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule

from parscale.errors import InputError, first_line
from parscale.output import say
from parscale.streams.tensors import belongs_to_streams
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText
from parscale.train.parallel import processes
from parscale.utils.files import disk_errors, publish, remove
from parscale.utils.hashes import HASHES, damage_of, write_hashes

PREFIX, SCRATCH = "checkpoint-", ".checkpoint.partial"
"""How a complete checkpoint is called, with its step, and one that is being written."""
_RUN, _PROGRESS = "run.json", "progress.json"
_HASHED = "hashes"
"""In `run.json`: which file has the hashes. A checkpoint that should have one and has none is damaged."""
MAY_CHANGE = (
    "output", "batch_size", "save_every", "keep", "resume", "max_skipped", "stream_parallel", "report_to", "cache_dir",
    "control",
)  # fmt: skip
"""Settings that a run may be gone on with in another way: they change no weight."""
_MADE_FROM = {"text": "another text than data={data} has now", "weights": "other weights than model={model!r} has now"}
"""What a run was made from that its settings do not tell, and what is said of another."""


class Checkpoints:
    """The checkpoints of one run, `checkpoint-<step>` in its output folder.

    Args:
        folder: the run's output, which all processes see.
        run: what makes it this run and no other: JSON values by name.
        keep: how many to keep, the newest ones.
    """

    def __init__(self, folder: Path, run: dict[str, Any], keep: int = 2) -> None:
        self.folder, self.run, self.keep = folder, json.loads(json.dumps(run, default=str)), keep

    def all(self) -> list[Path]:
        """The complete ones, oldest first. A folder with that name was renamed to it whole."""
        found = [path for path in self.folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(PREFIX)))

    def resume(self) -> Path | None:
        """The newest checkpoint that is as it was written, or None where there is none at all.

        A damaged one is named and kept as `checkpoint-<step>.damaged`. What a killed process left half-written is
        removed. Every process reads all of a checkpoint for it.

        Raises:
            InputError: it is of another run: names what differs. Or all are damaged.
        """
        if _is_first():
            shutil.rmtree(self.folder / SCRATCH, ignore_errors=True)
        damaged: dict[Path, str] = {}
        for checkpoint in reversed(self.all()):
            if (damage := _damage_of(checkpoint)) is None:
                self.check_same(_run_in(checkpoint), checkpoint.name)
                self._set_aside(damaged, checkpoint)
                return checkpoint
            damaged[checkpoint] = damage
        if damaged:
            listed = ", ".join(f"{checkpoint.name} ({damage})" for checkpoint, damage in damaged.items())
            raise InputError(
                f"output={self.folder}: no checkpoint is whole: {listed}; remove them to start again, or give another "
                "output"
            )
        return None

    def _set_aside(self, damaged: dict[Path, str], whole: Path) -> None:
        for checkpoint, damage in damaged.items() if _is_first() else ():
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            remove(aside)
            checkpoint.rename(aside)
            say(f"{checkpoint} is damaged ({damage}): going on from {whole.name}; the damaged one is {aside.name} now")

    def check_same(self, other: dict[str, Any], what: str) -> None:
        """Refuse to go on with `other`, the run of `what` in the folder, where it is not this one.

        Raises:
            InputError: names the first difference.
        """
        for name in self.run | other:
            ours, theirs = self.run.get(name), other.get(name)
            if ours != theirs:
                told = (
                    _MADE_FROM[name].format(**self.run)
                    if name in _MADE_FROM
                    else f"{name}={theirs!r} instead of {ours!r}"
                )
                raise InputError(
                    f"output={self.folder} holds {what} of another run, with {told}; give what it was started with, "
                    "or another output"
                )

    @contextmanager
    def writing(self, step: int) -> Iterator[Path]:
        """A folder to write the state at `step` into; it becomes `checkpoint-<step>` when all processes have.

        Raises:
            InputError: it cannot be written; those before it are untouched.
        """
        scratch, complete = self.folder / SCRATCH, self.folder / f"{PREFIX}{step}"
        try:
            if _is_first():
                shutil.rmtree(scratch, ignore_errors=True)
                scratch.mkdir(parents=True)
                run = {_HASHED: HASHES} | self.run
                (scratch / _RUN).write_text(json.dumps(run, indent=1), encoding="utf-8")
            _wait()
            with disk_errors():
                yield scratch
            _wait()
            if _is_first():
                write_hashes(scratch)
                remove(complete)
                publish(scratch, complete)
                for old in self.all()[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
            _wait()
        except (OSError, CheckpointException) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            kept = f"{self.all()[-1].name} is whole" if self.all() else "there is none before it"
            raise InputError(
                f"output={self.folder}: cannot write {complete.name} ({first_line(_cause(error))}); {kept}. "
                "Mend that and go on with --resume"
            ) from None


def save_state(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any, progress: dict[str, Any]) -> None:
    """Write a run's state. Every process calls it with its own part.

    Args:
        folder: from `Checkpoints.writing`.
        model: not wrapped; its parameters may be sharded (DTensor).
        optimizer: a torch optimizer over its trained parameters.
        scheduler: of its rates.
        progress: what else to keep: JSON values by name.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with _alone_or_together() as options:
        save(_tensors(model, optimizer), storage_writer=writer, **options)
    (folder / f"rng-{_rank()}.json").write_text(json.dumps(_random_state()), encoding="utf-8")
    if _is_first():
        groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        kept = progress | {"scheduler": scheduler.state_dict(), "groups": groups}
        (folder / _PROGRESS).write_text(json.dumps(kept), encoding="utf-8")


def load_state(folder: Path, model: nn.Module, optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Put a run's state back, in place, whatever number of processes wrote it. Returns `progress`."""
    reader = HuggingFaceStorageReader(str(folder))
    tensors = _tensors(model, optimizer)
    parameters = {name: (p, group) for name, p, group in _trained(model, optimizer)}
    for key, saved in reader.read_metadata().state_dict_metadata.items():
        kind, _, name = key.partition("/")
        if kind == "model":
            continue
        parameter, group = parameters[name]
        dtype: torch.dtype = saved.properties.dtype  # type: ignore[union-attr]
        if saved.size == parameter.shape:  # type: ignore[union-attr]
            value = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:  # the count of steps, which a fused optimizer wants beside the parameter
            beside = group.get("fused") or group.get("capturable")
            value = torch.zeros(saved.size, dtype=dtype, device=parameter.device if beside else "cpu")  # type: ignore[union-attr]
        optimizer.state[parameter][kind] = tensors[key] = value
    with _alone_or_together() as options:
        load(tensors, storage_reader=reader, **options)
    progress = read_json(folder / _PROGRESS)
    for group, saved in zip(optimizer.param_groups, progress.pop("groups"), strict=True):
        group.update({k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})
    scheduler.load_state_dict(progress.pop("scheduler"))
    return progress


def load_random_state(folder: Path) -> None:
    """Put this process's random generators back; a process that there was none of keeps its own."""
    file = folder / f"rng-{_rank()}.json"
    if file.exists():
        _set_random_state(json.loads(file.read_text(encoding="utf-8")))


def read_json(file: Path) -> dict[str, Any]:
    """What a run has written of itself.

    Raises:
        InputError: it is damaged.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}); give another output, or remove it") from None


def run_of(config: TrainConfig, data: PackedText, model: Any) -> dict[str, Any]:
    """What makes a run this one and no other. Where it runs, and how often it saves and logs, may change on the way."""
    settings = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    groups = processes() // config.stream_parallel
    return settings | {
        "sequences in a step": config.batch_size * groups,
        "text": data.fingerprint,
        "weights": _digest(model, values=config.stage != "pretrain"),
    }


def _digest(model: nn.Module, values: bool) -> str:
    """A hash of what was there before the streams: names, shapes and, if asked for, a sample of the values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if values and type(parameter) is nn.Parameter and not belongs_to_streams(name):
            sample = parameter.detach().flatten()[:: max(1, parameter.numel() // 256)]
            digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensors(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """`model/<name>` and, for each of the optimizer's tensors, `<its name>/<parameter's name>`."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # after a forward pass its whole parameters stand where the shards belong
    tensors = {}
    for name, parameter, _ in _trained(model, optimizer):
        tensors[f"model/{name}"] = parameter.detach()
        tensors |= {f"{key}/{name}": value for key, value in optimizer.state.get(parameter, {}).items()}
    return tensors


def _trained(model: nn.Module, optimizer: Any) -> Iterator[tuple[str, nn.Parameter, dict[str, Any]]]:
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter in groups:
            yield name, parameter, groups[parameter]


@contextmanager
def _alone_or_together() -> Iterator[dict[str, Any]]:
    """Arguments for torch, which warns of a single process even when it is told of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield {"no_dist": not dist.is_initialized()}


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],  # type: ignore[union-attr]
        "torch": _to_text(torch.get_rng_state()),
        "cuda": _to_text(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_text(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_from_text(state["cuda"]))


def _to_text(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _from_text(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _damage_of(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None. One from before there were hashes is believed."""
    if not (checkpoint / HASHES).exists():
        try:
            if _HASHED not in read_json(checkpoint / _RUN):
                return None
        except InputError:
            return f"{_RUN} cannot be read"
    return damage_of(checkpoint)


def _run_in(checkpoint: Path) -> dict[str, Any]:
    return {name: value for name, value in read_json(checkpoint / _RUN).items() if name != _HASHED}


def _cause(error: BaseException) -> Any:
    """What went wrong, out of what torch wraps it in: a failure for each process."""
    failures = getattr(error, "failures", {})
    return next((wrapped[0] for wrapped in failures.values()), error)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _is_first() -> bool:
    return _rank() == 0


def _wait() -> None:
    if dist.is_initialized():
        dist.barrier()
