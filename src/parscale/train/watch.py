"""What the streams do while they train, for the loggers, and two alarms from the method's known failures."""

import math
import sys
from typing import Any

from torch import Tensor

from parscale.probe import StreamProbe, probe_streams
from parscale.streams.backbone import has_streams

ADVICE = {
    "stream collapse": "P streams are no better than one; tell them apart with more than a prefix (diversify with lora "
    "or rank1), or raise stream_learning_rate",
    "weight monoculture": "one stream gets nearly all the weight; train with head_rate=0.1",
}
"""What helps against each failure that a probe's verdict may name."""


class StreamWatch:
    """Looks at the streams on the same held-out text again and again.

    Args:
        input_ids: (B, T) token ids, without padding.
        control: a model, best P=1 with a prefix, whose losses the streams' errors are measured against.
    """

    def __init__(self, input_ids: Tensor, control: Any = None) -> None:
        self.input_ids, self.control = input_ids, control
        self.alarmed: set[str] = set()

    def look(self, model: Any) -> StreamProbe | None:
        """The streams now; None for a model with one stream. All processes of a sharded model call it together."""
        if not has_streams(model) or model.streams == 1:
            return None
        state = model.base_model.stream_state
        group, state.group = state.group, None  # every process looks at all streams, however they are split
        try:
            return probe_streams(model, self.input_ids, control=self.control)
        finally:
            state.group = group

    def alarms(self, seen: StreamProbe, step: int) -> list[str]:
        """What to say about the two failures, each the first time it is seen."""
        found = [part for part in seen.verdict.split("; ") if part.partition(" (")[0] in ADVICE.keys() - self.alarmed]
        self.alarmed.update(part.partition(" (")[0] for part in found)
        return [f"alarm at step {step}: {part}: {ADVICE[part.partition(' (')[0]]}" for part in found]


def as_logs(seen: StreamProbe) -> dict[str, float]:
    """A look at the streams as numbers for the Trainer's loggers."""
    logs = {f"streams/weight_{i}": weight for i, weight in enumerate(seen.weights)}
    logs |= {f"streams/loss_{i}": loss for i, loss in enumerate(seen.stream_losses)}
    logs |= {
        "streams/effective": seen.effective_streams,
        "streams/entropy": math.log(seen.effective_streams),
        "streams/cosine": seen.cosine or 0.0,
        "streams/collapsed": float(seen.collapsed),
        "streams/monoculture": float(seen.monoculture),
    }
    if seen.error_correlation is not None:
        logs["streams/error_correlation"] = seen.error_correlation
    return logs


def say(message: str) -> None:
    """One line on the error stream."""
    print(f"parscale: {message}", file=sys.stderr, flush=True)
