"""Keeping the streams apart and in use while they train: ε or a temperature that falls, penalties, dropout of streams.

None of it is the paper's, and none of it stays in the model: a checkpoint runs with its own ε and all its streams.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainerCallback

from parscale.streams.state import StreamState
from parscale.train.config import Balance


class StreamBalance(TrainerCallback):
    """Sets what a step trains with before it, takes it back after it, and holds the step's penalty.

    Args:
        model: a causal LM with several streams.
        settings: what to do.
        seed: of the streams that are dropped.
    """

    def __init__(self, model: Any, settings: Balance, seed: int) -> None:
        self.model, self.settings = model, settings
        self.state: StreamState = model.base_model.stream_state
        self.seed = seed
        self.seen: list[Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """ε of this step, and which streams run in it: a function of the seed and the step, so a resumed run goes on
        as it would have gone."""
        settings, own = self.settings, self.state.config
        left = max(0.0, 1 - state.global_step / (settings.smoothing_share * state.max_steps))
        smoothing, streams, row_mask = own.smoothing, own.streams, None
        if settings.smoothing_start is not None:
            smoothing += left * (settings.smoothing_start - own.smoothing)
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + state.global_step)
        if torch.rand((), generator=draw) < settings.fewer_streams:
            streams = int(torch.randint(1, own.streams, (), generator=draw))
        if settings.stream_dropout > 0:
            row_mask = _kept(streams, settings.stream_dropout, draw).to(self.model.device)
        self.state.set(
            streams=streams,
            row_mask=row_mask,
            smoothing=smoothing,
            temperature=1 + left * (settings.temperature_start - 1),
            observer=self._observe if settings.penalizes else None,
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The model as it is meant to be, before anyone evaluates or saves it."""
        self.take_back()

    def take_back(self) -> None:
        """Run the model as it is meant to be."""
        own = self.state.config
        self.state.set(
            streams=own.streams, row_mask=None, adaptive=None, smoothing=own.smoothing, temperature=1.0, observer=None
        )

    def take_penalty(self) -> Tensor | None:
        """What the last forward pass adds to the loss; None if nothing."""
        penalty = sum(self.seen[1:], self.seen[0]) if self.seen else None
        self.seen = []
        return penalty

    def _observe(self, hidden: Float[Tensor, "p b t d"], weights: Float[Tensor, "p b t"]) -> None:
        if not torch.is_grad_enabled() or hidden.shape[0] == 1:
            return
        settings = self.settings
        if settings.load_balance > 0:
            self.seen.append(settings.load_balance * load_imbalance(weights))
        if settings.entropy_floor > 1:
            self.seen.append((math.log(settings.entropy_floor) - entropy(weights)).clamp(min=0))
        if settings.decorrelation > 0:
            self.seen.append(settings.decorrelation * squared_correlation(hidden))


def load_imbalance(weights: Float[Tensor, "p b t"]) -> Tensor:
    """P·Σ_p f_p·m_p − 1: f_p is the share of tokens of which stream p has the largest weight, m_p its mean weight, as
    for sparse experts (arXiv 2101.03961, equation 4). 0 when balanced, P − 1 when one stream has all. A scalar.
    """
    p = weights.shape[0]
    chosen = torch.nn.functional.one_hot(weights.argmax(0), p).float().mean((0, 1))
    return p * (chosen * weights.mean((1, 2))).sum() - 1


def entropy(weights: Float[Tensor, "p b t"]) -> Tensor:
    """Mean over tokens of −Σ_p w_p·ln w_p, in nats. A scalar."""
    return -(weights * weights.clamp(min=1e-12).log()).sum(0).mean()


def squared_correlation(hidden: Float[Tensor, "p b t d"]) -> Tensor:
    """Mean squared correlation, over tokens and channels, of two streams' states; each channel less its mean over
    tokens and streams, which all streams share. A scalar from 0 to 1."""
    flat = hidden.float().flatten(1, 2)  # (P, B·T, d)
    centred = (flat - flat.mean((0, 1))).flatten(1)
    unit = torch.nn.functional.normalize(centred, dim=1)
    pairs = unit @ unit.T  # (P, P)
    p = pairs.shape[0]
    return (pairs.square().sum() - pairs.diagonal().square().sum()) / (p * (p - 1))


def _kept(streams: int, dropout: float, draw: torch.Generator) -> Tensor:
    """(P, 1), true where a stream counts, in all rows alike; never nowhere."""
    kept = torch.rand(streams, 1, generator=draw) >= dropout
    kept[torch.randint(streams, (), generator=draw)] |= ~kept.any()
    return kept
