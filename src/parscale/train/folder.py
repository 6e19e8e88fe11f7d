"""The folder of a run: what it gave and was (`train.json`), its model and tokenizer; whole, or absent.

No other file knows which names stand in it, or what is done where it is there already, or cannot be written.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from parscale.errors import InputError, first_line
from parscale.load import RECORD
from parscale.train.checkpoints import PREFIX, SCRATCH, read_json
from parscale.train.model import save_model
from parscale.utils.files import COMMITTED, UNFINISHED, add_files, finish, remove_unfinished
from parscale.utils.lock import LOCK, hold

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
    checkpoints: Sequence[Path] = (),
) -> None:
    """Write model, tokenizer and `train.json` into the output folder: all of them or none. `train.json` comes last.

    Args:
        model: what was trained.
        tokenizer: its tokenizer.
        output: the folder; it may hold this run's checkpoints and logs.
        record: what `train.json` holds.
        whole: the state of a model that is sharded.
        checkpoints: those of the run, oldest first: a save that fails names what is left.

    Raises:
        InputError: it cannot be written.
    """
    try:
        with add_files(output, last=RECORD) as folder:
            save_model(model, folder, whole)
            tokenizer.save_pretrained(folder)
            (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    except OSError as error:
        if (output / COMMITTED).exists():
            left = "the model is whole, and moved there by --resume"
        elif checkpoints:
            left = f"the model was not saved; {checkpoints[-1].name} is whole. Mend that and go on with --resume"
        else:
            left = "the model was not saved, and there is no checkpoint"
        raise InputError(f"output={output}: cannot write there ({first_line(error)}); {left}") from error


@contextmanager
def hold_output(output: Path, argument: str = "output") -> Iterator[None]:
    """Hold the folder of a run until the block ends. What a killed process was saving there is finished where it was
    whole, and removed where it was not.

    Raises:
        InputError: another process holds it.
    """
    with hold(output, argument):
        _clear(output)
        yield


def check_output(output: Path, *, resume: bool = False, control: Path | None = None) -> None:
    """Refuse, before any work, an output folder that is not empty or that cannot be written. To resume, it may hold a
    run's checkpoints and logs. The folder of its control may be in it. What a killed process was saving is removed.

    Raises:
        InputError: naming the folder and the reason.
    """
    _clear(output)
    left_out = {LOCK} if control is None else {LOCK, control.name}
    held = [file.name for file in output.iterdir() if file.name not in left_out] if output.is_dir() else []
    ours = [name for name in held if name in (LOGS, CONTROL) or name.startswith((PREFIX, SCRATCH))]
    if ours and ours == held and not resume:
        raise InputError(f"output={output} holds a run that was stopped; add --resume to go on, or give another name")
    if (output.exists() and not output.is_dir()) or ours != held:
        raise InputError(f"output={output} exists and is not an empty folder; give another name or remove it")
    probe, there = output / UNFINISHED, output.exists()
    try:
        probe.mkdir(parents=True)
        probe.rmdir()
    except OSError as error:
        raise InputError(f"output={output}: cannot write there ({error.strerror or error})") from None
    if not there:
        output.rmdir()


def _clear(output: Path) -> None:
    if output.is_dir():
        finish(output, RECORD)
        remove_unfinished(output)


def finished_run(output: Path) -> dict[str, Any] | None:
    """The record of the run in a folder, if it has ended: what it gave (`result`, of TrainResult), and was (`run`). A
    save that a kill cut off is finished first; every process of a run may ask at once."""
    finish(output, RECORD)
    file = output / RECORD
    return read_json(file) if file.is_file() else None
