"""The folder of a run: what it gave and was (`train.json`), its model and tokenizer; whole, or absent.

No other file knows which names stand in it, or what is done where it is there already, or cannot be written.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.errors import InputError, first_line
from parscale.load import RECORD
from parscale.train.checkpoints import PREFIX, SCRATCH, read_json
from parscale.train.model import save_model

LOGS = "runs"
"""Where TensorBoard's event files stand in the output folder."""

CONTROL = "control"
"""The control's folder inside the run's own, and its key in `train.json`."""


@dataclass(frozen=True)
class TrainResult:
    """What a run gave. Losses are nats per token on the held-out text; `history` has one row per log or evaluation."""

    output: str
    stage: str
    model: str
    streams: dict[str, Any]
    seed: int
    tokens: int
    steps: int
    skipped_steps: int
    parameters: int
    stream_parameters: int
    start_loss: float
    validation_loss: float
    corpora: dict[str, dict[str, float]]
    probe: dict[str, Any] | None
    seconds: float
    history: list[dict[str, Any]]


def save_run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    record: dict[str, Any],
    whole: dict[str, Tensor] | None = None,
) -> None:
    """Write model, tokenizer and `train.json` under a temporary name, then rename: the folder is whole or absent. Into
    a folder that is there the files are moved, `train.json` last: with it the folder is whole.

    `whole` is the state of a model that is sharded.
    """
    scratch = _scratch(output)
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        save_model(model, scratch, whole)
        tokenizer.save_pretrained(scratch)
        (scratch / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
        if output.exists():  # with this run's checkpoints and logs; or empty, and maybe where this process works
            for file in sorted(scratch.iterdir(), key=lambda file: file.name == RECORD):  # the record makes it whole
                file.replace(output / file.name)
            scratch.rmdir()
        else:
            scratch.rename(output)
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if isinstance(error, OSError) or "No space left" in str(error):
            raise InputError(
                f"output={output}: cannot write there ({first_line(error)}); the model was not saved"
            ) from error
        raise


def check_output(output: Path, *, resume: bool = False, control: Path | None = None) -> None:
    """Refuse, before any work, an output folder that is not empty or that cannot be written. To resume, it may hold a
    run's checkpoints and logs. The folder of its control may be in it.

    Raises:
        InputError: naming the folder and the reason.
    """
    held = (
        [file.name for file in output.iterdir() if control is None or file.name != control.name]
        if output.is_dir()
        else []
    )
    ours = [name for name in held if name in (LOGS, CONTROL) or name.startswith((PREFIX, SCRATCH))]
    if ours and ours == held and not resume:
        raise InputError(f"output={output} holds a run that was stopped; add --resume to go on, or give another name")
    if (output.exists() and not output.is_dir()) or ours != held:
        raise InputError(f"output={output} exists and is not an empty folder; give another name or remove it")
    probe = _scratch(output)
    shutil.rmtree(probe, ignore_errors=True)  # a run that was killed while it saved leaves half a model there
    try:
        probe.mkdir(parents=True)
        probe.rmdir()
    except OSError as error:
        raise InputError(f"output={output}: cannot write there ({error.strerror or error})") from None


def _scratch(output: Path) -> Path:
    """Where a run is written before it has its name: beside it, on the same disk. A relative `.` has no name."""
    whole = output.resolve()
    return whole.with_name(f".{whole.name}.partial")


def finished_run(output: Path) -> dict[str, Any] | None:
    """The record of the run in a folder, if it has ended: what it gave (`result`, of TrainResult), and was (`run`)."""
    file = output / RECORD
    return read_json(file) if file.is_file() else None


@contextmanager
def emptied(output: Path) -> Iterator[None]:
    """A run that fails leaves no empty folder behind."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            output.rmdir()
        raise
