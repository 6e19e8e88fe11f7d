"""What a person watches during training: one bar with loss, tokens per second and the streams' weights."""

import time
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback


class ProgressBar(TrainerCallback):
    """A rich progress bar; on a pipe or in a log file, a line per evaluation instead."""

    def __init__(self, title: str, tokens_per_step: int) -> None:
        self.title = title
        self.tokens_per_step = tokens_per_step
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
        )
        self.live = self.progress.console.is_terminal
        self.started = 0.0
        self.first_step = 0
        self.weights: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started, self.first_step = time.monotonic(), state.global_step
        self.task = self.progress.add_task(self.title, total=state.max_steps, completed=state.global_step, status="")
        if self.live and state.is_world_process_zero:
            self.progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or logs is None or not ({"loss", "eval_loss"} & logs.keys()):
            return
        seconds = max(time.monotonic() - self.started, 1e-9)
        speed = (state.global_step - self.first_step) * self.tokens_per_step / seconds
        parts = [f"{name} {logs[key]:.3f}" for name, key in (("loss", "loss"), ("val", "eval_loss")) if key in logs]
        self.weights = [logs[k] for k in logs if k.startswith("streams/weight_")] or self.weights
        if self.weights:
            parts.append("weights " + "/".join(f"{w:.2f}" for w in self.weights))
        parts.append(f"{speed:,.0f} tok/s")
        status = " · ".join(parts)
        self.progress.update(self.task, status=status)
        if not self.live and "eval_loss" in logs:
            line = f"{self.title} {state.global_step}/{state.max_steps} {status}"
            self.progress.console.print(line, markup=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.live:
            self.progress.stop()
