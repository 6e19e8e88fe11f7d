"""What the plain model did on one batch, from which the diversifiers find a good start."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class LayerStatistics:
    """What one attention module attends with on a calibration batch, heads apart; keys and queries after RoPE.

    queries: (Hk, N, Dk), the query tokens of all heads that share a key/value head.
    """

    key_mean: Float[Tensor, "hk dk"]
    key_std: Float[Tensor, "hk dk"]
    value_mean: Float[Tensor, "hk dv"]
    value_std: Float[Tensor, "hk dv"]
    queries: Float[Tensor, "hk tokens dk"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Hk, Dk, Dv): key/value heads, size of a key, size of a value."""
        return (self.key_mean.shape[0], self.key_mean.shape[1], self.value_mean.shape[1])


@dataclass(frozen=True)
class Calibration:
    """One batch through the plain model.

    Attributes:
        ids: the batch.
        logits: what the plain model predicted.
        layers: attention module name, within the backbone → statistics; empty if no module reaches transformers'
            attention interface.
    """

    ids: Int[Tensor, "b t"]
    logits: Float[Tensor, "b t v"]
    layers: Mapping[str, LayerStatistics]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode and no gradient is recorded."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
