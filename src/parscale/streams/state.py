"""Which streams run, and how they are merged: the one place where that changes, and where it is put back.

A pass takes its `Run` when it begins and keeps it to its end. So no other thread, nested pass or interruption can
change it halfway. What a thread chooses for a while is its own; what `set` changes holds for all threads.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from parscale.config import StreamsConfig
from parscale.streams.adaptive import FirstStream, HardTokens
from parscale.streams.order import Tail


@dataclass(frozen=True, eq=False)
class Run:
    """How one pass runs the streams. It never changes; `dataclasses.replace` makes another.

    Args:
        streams: p, how many of the P streams run.
        smoothing: ε; training may start with another than the model's own.
        temperature: divides the aggregation head's logits; other than 1 in training alone.
        row_mask: (p, B), which streams count in which row of the batch; None if all do in all.
        adaptive: when a token gets more than these streams; None if never.
        merged: False makes the backbone return the P·B rows of its streams.
        observer: called with the streams' final hidden states (p, B, T, d) and weights (p, B, T), before they merge.
        group: the processes that the streams are split over (train/parallel.py); None if this one runs them all.
        tail: tokens of other streams that stand behind stream 0's prompt in the same pass; else None.
        first_pass: what stream 0 left of tokens that the others run over after it; else None.
        hidden: takes the backbone's final hidden state; None if nobody asks for it.
    """

    streams: int
    smoothing: float
    temperature: float = 1.0
    row_mask: Bool[Tensor, "p b"] | None = None
    adaptive: HardTokens | None = None
    merged: bool = True
    observer: Callable[[Tensor, Tensor], None] | None = None
    group: Any = None
    tail: Tail | None = None
    first_pass: FirstStream | None = None
    hidden: list[Float[Tensor, "b t d"]] | None = None

    @property
    def local_streams(self) -> slice:
        """Which of the P streams run in this process."""
        if self.group is not None:
            return self.group.share(self.streams)
        return slice(0 if self.first_pass is None else 1, self.streams)

    @property
    def n_local(self) -> int:
        """How many streams run in this process."""
        return self.local_streams.stop - self.local_streams.start


class _OfThread(threading.local):
    """A thread's own. `torch.compile` traces and guards a thread-local, which it does not do with a context variable.

    Attributes:
        chosen: runs in place of the model's default.
        announced: what the causal LM has prepared for the pass that its backbone begins next.
        running: the pass that the backbone is in.
    """

    def __init__(self) -> None:
        self.chosen: Run | None = None
        self.announced: Run | None = None
        self.running: Run | None = None


class StreamState:
    """What the modules of one model share: held by the backbone and by everything that runs by stream.

    Attributes:
        config: what the model was given.
        generator: makes the prefixes of each layer while it is there (`PrefixGenerator`); else they are the banks.
        default: what runs in every thread that has not chosen otherwise.
    """

    def __init__(self, config: StreamsConfig) -> None:
        self.config = config
        self.generator: Callable[[int], tuple[Tensor, Tensor]] | None = None
        self.default = Run(config.streams, config.smoothing)
        self._thread = _OfThread()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_thread"}

    def __setstate__(self, attributes: dict[str, Any]) -> None:
        vars(self).update(attributes, _thread=_OfThread())

    @property
    def chosen(self) -> Run:
        """What the next pass of this thread runs."""
        chosen = self._thread.chosen
        return self.default if chosen is None else chosen

    @property
    def run(self) -> Run:
        """The pass that this thread is in, or else what the next one runs."""
        running = self._thread.running
        return self.chosen if running is None else running

    @property
    def shares_kv(self) -> bool:
        """Whether other streams than stream 0 run now, on its keys and values."""
        return self.config.kv == "shared" and self.run.streams > 1

    def set(self, **changes: Any) -> None:
        """Change fields of `Run` from the next pass on: for all threads, or to the end of what this one has chosen."""
        if self._thread.chosen is None:
            self.default = replace(self.default, **changes)
        else:
            self._thread.chosen = replace(self._thread.chosen, **changes)

    @contextmanager
    def using(self, **changes: Any) -> Iterator[None]:
        """Let this thread run with other fields of `Run` for a while."""
        thread, before = self._thread, self._thread.chosen
        try:
            thread.chosen = replace(self.chosen, **changes)
            yield
        finally:
            thread.chosen = before

    def call(self, run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs) with `run` chosen in this thread.

        A call where `using` would do: Ctrl-C can come before the `__exit__` of a `with`, but not into this `finally`.
        """
        thread, before = self._thread, self._thread.chosen
        try:
            thread.chosen = run
            return function(*args, **kwargs)
        finally:
            thread.chosen = before

    def announce(self, run: Run, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs), in which the first pass of the backbone is `run`. Passes nested in it are not."""
        thread, before = self._thread, self._thread.announced
        try:
            thread.announced = run
            return function(*args, **kwargs)
        finally:
            thread.announced = before

    def in_pass(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """function(*args, **kwargs) as a pass of its own: what was announced, or what this thread runs next."""
        thread, before, announced = self._thread, self._thread.running, self._thread.announced
        run = self.chosen if announced is None else announced
        try:
            thread.announced, thread.running = None, run
            return function(*args, **kwargs)
        finally:
            thread.running = before

    def checkpointed(self, checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any) -> Any:
        """checkpoint(function, *args), whose second run, in the backward pass, is the first one's `Run`. It comes after
        the pass has ended, and on a GPU in another thread."""
        if torch.compiler.is_compiling():  # recomputes within its graph
            return checkpoint(function, *args)
        return checkpoint(partial(self._again, self.run, function), *args)

    def _again(self, run: Run, function: Callable[..., Any], *args: Any) -> Any:
        thread, before = self._thread, self._thread.running
        try:
            thread.running = run
            return function(*args)
        finally:
            thread.running = before
