"""What may go wrong in a run, and what is done: killed processes, full disks, gradients that are not finite, SIGTERM.

A mixin for any Trainer of transformers. Its checkpoints are those of `checkpoints.py` instead of the Trainer's own.
"""

import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from parscale.train.checkpoints import Checkpoints, load_random_state, load_state, save_state

DEADLINE = "the deadline"


class OutOfTime(Exception):
    """A run was stopped at its deadline. It is saved, and the same call with `resume` goes on."""


class FaultTolerance:
    """Mixin in front of a `Trainer`: whole checkpoints, bitwise resuming, and steps that are skipped.

    Args:
        checkpoints: where the run's state goes.
        max_skipped: stop after so many steps in a row without a finite loss and gradient.
        deadline: stop after the first step that ends behind it, in seconds of `time.time()`; by default never.

    Attributes:
        skipped: how many steps were skipped so far, those before a resume included.
        seconds: how long the run has trained, those before a resume included.
        gradients: norm of the last step's gradient in each parameter group, before clipping.
        stopped_by: why training stopped early: "SIGTERM", `DEADLINE`, or which groups' gradients were not finite; else
            None.
    """

    model: Any
    args: Any
    state: Any
    optimizer: Any
    lr_scheduler: Any
    accelerator: Any
    is_deepspeed_enabled: bool

    def __init__(
        self,
        *args: Any,
        checkpoints: Checkpoints,
        max_skipped: int = 10,
        deadline: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoints = checkpoints
        self.max_skipped = max_skipped
        self.deadline = deadline
        self.skipped = 0
        self._started = time.monotonic()
        self.gradients: dict[str, float] = {}
        self.stopped_by: str | None = None
        self.terminated = threading.Event()
        self._finite_loss: Tensor | None = None
        self.add_callback(_Faults(self))  # type: ignore[attr-defined]

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        finite = loss.isfinite().all()
        self._finite_loss = finite if self._finite_loss is None else self._finite_loss & finite
        return loss

    def take_finite_loss(self) -> Tensor:
        """Whether all losses were finite since the last call."""
        finite, self._finite_loss = self._finite_loss, None
        return torch.tensor(True) if finite is None else finite

    def _clip_grad_norm(self, model: Any) -> Any:
        if self.is_deepspeed_enabled:
            return super()._clip_grad_norm(model)  # type: ignore[misc]
        self.accelerator.unscale_gradients()
        total = self._measure_gradients()
        clip = torch.nn.utils.clip_grads_with_norm_
        clip([p for group in self.optimizer.param_groups for p in group["params"]], self.args.max_grad_norm, total)
        return total

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self.is_deepspeed_enabled:
            return self._measure_gradients()
        return super()._get_grad_norm(model, grad_norm)  # type: ignore[misc]

    def _measure_gradients(self) -> Tensor:
        """The norm of all gradients; `gradients` gets that of each parameter group."""
        norms = {}
        for group in self.optimizer.param_groups:
            found = [p.grad for p in group["params"] if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(found) if found else torch.zeros((), device=self.args.device)
            norms[group.get("name", "all")] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        stacked = torch.stack(list(norms.values()))
        self.gradients = dict(zip(norms, stacked.tolist(), strict=True))
        return torch.linalg.vector_norm(stacked)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        self.store_flos()  # type: ignore[attr-defined]
        with self.checkpoints.writing(self.state.global_step) as folder:
            progress = {
                "skipped": self.skipped,
                "seconds": self.seconds,
                "waited": [one.early_stopping_patience_counter for one in self._patient()],
            }
            save_state(folder, self._bare_model(), self._bare_optimizer(), self.lr_scheduler, progress)
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: the parameters are read with the optimizer's state, once both are where they will be."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            progress = load_state(Path(checkpoint), self._bare_model(), self._bare_optimizer(), self.lr_scheduler)
            self.skipped = progress["skipped"]
            self._started -= progress["seconds"]
            for callback, waited in zip(self._patient(), progress["waited"], strict=True):
                callback.early_stopping_patience_counter = waited

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        """There is none: bfloat16 and float32 need no loss scaling."""

    def _patient(self) -> list[Any]:
        """The callbacks that stop a run which does not get better: they count evaluations."""
        return [one for one in self.callback_handler.callbacks if isinstance(one, EarlyStoppingCallback)]  # type: ignore[attr-defined]

    def has_run_out_of_patience(self) -> bool:
        """Whether the last evaluation was one too many that was no better."""
        return any(one.early_stopping_patience_counter >= one.early_stopping_patience for one in self._patient())

    def _bare_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _bare_optimizer(self) -> Any:
        return getattr(self.optimizer, "optimizer", self.optimizer)


@contextmanager
def catching_sigterm(answer: Callable[[], None]) -> Iterator[None]:
    """While it lasts, SIGTERM calls `answer` and nothing else. Outside the main thread signals stay as they are."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, lambda _number, _frame: answer())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def command_to_resume() -> str:
    """What to type to go on with this run. Experiments and the pilot have no flag for it: they always go on."""
    name = Path(sys.argv[0]).name
    started = ["parscale", *sys.argv[1:]] if name in ("parscale", "cli.py") else [name, *sys.argv[1:]]
    as_it_was = "--resume" in started or started[1:2] in (["experiment"], ["pilot"])
    return shlex.join(started if as_it_was else [*started, "--resume"])


class _Faults(TrainerCallback):
    """Skips steps that would spoil the weights; saves and stops when told to, or when nothing else helps."""

    def __init__(self, trainer: FaultTolerance) -> None:
        self.trainer = trainer
        self.in_a_row, self.trouble = 0, ""
        self.told: str | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        late = trainer.deadline is not None and time.time() > trainer.deadline
        finite, stop = _agree(trainer.take_finite_loss(), late or trainer.terminated.is_set(), args.device)
        self.told = (DEADLINE if late else "SIGTERM") if stop else None
        spoilt = [name for name, norm in trainer.gradients.items() if not torch.isfinite(torch.tensor(norm))]
        if finite and not spoilt:
            self.in_a_row = 0
            return
        for group in trainer.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None  # the optimizer passes over what has no gradient
        trainer.skipped += 1
        self.in_a_row += 1
        what = f"gradient of {', '.join(spoilt)}" if spoilt else "loss"
        self.trouble = f"the {what} was not finite in {self.in_a_row} steps in a row"

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_save = False  # the model itself is saved next; and the Trainer would add a step to go on
            return
        if self.trainer.is_deepspeed_enabled:  # its state cannot be kept, so a run of it cannot be stopped to go on
            return
        if self.told is not None:
            self.trainer.stopped_by = self.told
        elif self.in_a_row >= self.trainer.max_skipped:
            self.trainer.stopped_by = self.trouble
        if self.trainer.stopped_by is not None:
            # an evaluation that is due comes first, and is in what is saved: to go on would not make up for it
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped_by == self.told and self.trainer.has_run_out_of_patience():
            self.trainer.stopped_by = None  # the evaluation in this very step ended the run: nothing is left to go on


def _agree(finite: Tensor, stop: bool, device: torch.device) -> tuple[bool, bool]:
    """All processes do the same: one that saw a loss that is not finite, or a signal, decides for all."""
    flags = torch.stack([~finite.to(device), torch.tensor(stop, device=device)]).float()
    if dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    spoilt, stopped = flags.tolist()
    return not spoilt, bool(stopped)
