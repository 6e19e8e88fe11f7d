"""What the streams do while they train, for the loggers, and two alarms from the method's known failures."""

import math
from statistics import fmean
from typing import Any

from torch import Tensor

from parscale.probe import StreamProbe, control_losses, probe_streams
from parscale.probe_details import StreamDetails, probe_details
from parscale.streams.backbone import has_streams

ADVICE = {
    "stream collapse": "P streams are no better than one; give them tokens, a higher stream_learning_rate, or more "
    "than a prefix to tell them apart (diversify with lora)",
    "weight monoculture": "one stream gets nearly all the weight; train with head_rate=0.1",
}
"""What helps against each failure that a probe's verdict may name."""
CLOSELY = (2, 256)
"""Rows and tokens of a close look, at most."""


class StreamWatch:
    """Looks at the streams on the same held-out text again and again.

    Args:
        input_ids: (B, T) token ids, without padding.
        control: a model, best P=1 with a prefix, whose losses the streams' errors are measured against. It is run once,
            and not kept.
    """

    def __init__(self, input_ids: Tensor, control: Any = None) -> None:
        self.input_ids = input_ids
        self.control = None if control is None else control_losses(control, input_ids)
        self.suspected: set[str] = set()
        self.alarmed: set[str] = set()

    def look(self, model: Any) -> StreamProbe | None:
        """The streams now; None for a model with one stream. All processes of a sharded model call it together."""
        if not has_streams(model) or model.streams == 1:
            return None
        with model.base_model.stream_state.using(group=None):  # every process runs all streams
            return probe_streams(model, self.input_ids, control=self.control)

    def look_closely(self, model: Any) -> StreamDetails | None:
        """All that a probe tells, on as much of the text as leaves room for attention weights and gradients. Not of a
        sharded model, whose tensors are not whole in any process."""
        if not has_streams(model) or model.streams == 1:
            return None
        rows, length = CLOSELY
        control = None if self.control is None else self.control[:rows, : length - 1]
        with model.base_model.stream_state.using(group=None):
            return probe_details(model, self.input_ids[:rows, :length], control=control)

    def alarms(self, seen: StreamProbe, step: int) -> list[str]:
        """What to say about the two failures, each once, when it is seen for the second time in a row: streams that
        have just begun are no better than one."""
        failures = {part.partition(" (")[0]: part for part in seen.verdict.split("; ")}
        lasting = [name for name in failures if name in ADVICE and name in self.suspected and name not in self.alarmed]
        self.suspected = set(failures)
        self.alarmed.update(lasting)
        return [f"alarm at step {step}: {failures[name]}: {ADVICE[name]}" for name in lasting]


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
    logs |= {f"streams/cosine_layer_{i}": cosine for i, cosine in enumerate(seen.layer_cosine)}
    if seen.error_correlation is not None:
        logs["streams/error_correlation"] = seen.error_correlation
    return logs


def details_as_logs(seen: StreamDetails) -> dict[str, float]:
    """What a close look tells beside `as_logs`."""
    attention = seen.prefix_attention
    logs = {f"streams/loss_without_{i}": loss for i, loss in enumerate(seen.loss_without)}
    logs |= {f"streams/gradient_{i}": share for i, share in enumerate(seen.gradient_share)}
    logs |= {f"streams/effective_layer_{i}": count for i, count in enumerate(seen.spectrum_streams)}
    logs |= {f"streams/prefix_attention_{i}": fmean(of) for i, of in enumerate(zip(*attention, strict=True))}
    logs |= {f"streams/prefix_attention_layer_{i}": fmean(of) for i, of in enumerate(attention)}
    if seen.loss_factor is not None and seen.gain is not None:
        logs |= {"streams/loss_factor": seen.loss_factor, "streams/gain": seen.gain}
    return logs
