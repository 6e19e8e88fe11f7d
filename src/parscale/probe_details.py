"""A closer look at the streams than a training log can afford: where they look, who learns, who would be missed."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from parscale.probe import StreamProbe, control_losses, probe_streams, token_losses, unmerged
from parscale.streams.aggregate import stream_weights
from parscale.streams.attention import TAG
from parscale.streams.diversify.calibration import evaluating
from parscale.streams.order import split
from parscale.streams.tensors import stream_tensors
from parscale.train.stages import is_diversifier

BANDS = 8
"""Into so many parts a sequence is cut where something is told by position."""


@dataclass(frozen=True)
class StreamDetails:
    """Of one model on one batch, beside the `probe`. Lists by stream have one entry for each active stream.

    Attributes:
        loss_without: merged loss with that stream left out, nats per token.
        spectrum_streams: effective number of streams after each layer, from the spectrum of their covariance:
            (Σλ)²/Σλ² of the P×P matrix of the streams' states, each centred over tokens. 1 to P.
        gradient_share: each stream's share of the squared gradient norm of what tells the streams apart. A tensor that
            all streams use counts for none.
        prefix_attention: (layer, stream), the share of attention that the prefix gets; empty without a prefix.
        prefix_attention_by_position: (band, stream), the same over all layers, by place in the sequence.
        weights_by_position: (band, stream), mean aggregation weight by place in the sequence.
        loss_factor: [(P−1)ρ+1]/P, by which the paper's section 2 has the reducible loss shrink; None without a control.
        gain: the control's loss minus the merged one, nats per token; None without a control.
    """

    probe: StreamProbe
    loss_without: list[float]
    spectrum_streams: list[float]
    gradient_share: list[float]
    prefix_attention: list[list[float]]
    prefix_attention_by_position: list[list[float]]
    weights_by_position: list[list[float]]
    loss_factor: float | None
    gain: float | None


def probe_details(model: Any, input_ids: Int[Tensor, "b t"], *, control: Any = None) -> StreamDetails:
    """Look closely at every active stream. Arguments and errors as of `probe_streams`.

    Needs memory for a backward pass and, layer by layer, for attention weights (P·B, H, T, n+T).
    """
    seen = probe_streams(model, input_ids, control=control)
    input_ids = input_ids.to(model.device)
    p, state = model.streams, model.base_model.stream_state
    with evaluating(model):
        with torch.no_grad(), unmerged(model):
            layers = model(input_ids=input_ids, use_cache=False, output_hidden_states=True).hidden_states[1:]
        hidden = split(layers[-1], p)
        weights = stream_weights(hidden, model.base_model.aggregate_layer, state.config.smoothing)
        without = [_loss_without(model, input_ids, stream) for stream in range(p)] if p > 1 else []
        attention = _prefix_attention(model, input_ids) if state.config.has_prefix else None
        gradients = _gradient_share(model, input_ids)
        gain = None if control is None else control_losses(control, input_ids).mean().item() - seen.loss
    rho = seen.error_correlation
    return StreamDetails(
        probe=seen,
        loss_without=without,
        spectrum_streams=[spectrum_streams(split(h, p)) for h in layers] if p > 1 else [],
        gradient_share=gradients,
        prefix_attention=[] if attention is None else attention.mean(-1).tolist(),
        prefix_attention_by_position=[] if attention is None else _bands(attention.mean(0)),
        weights_by_position=_bands(weights.mean(1)),
        loss_factor=None if rho is None else ((p - 1) * rho + 1) / p,
        gain=gain,
    )


def spectrum_streams(hidden: Float[Tensor, "p b t d"]) -> float:
    """(Σλ)²/Σλ², λ the eigenvalues of the streams' covariance over tokens and channels."""
    flat = hidden.float().flatten(1, 2)  # (P, B·T, d)
    rows = (flat - flat.mean(1, keepdim=True)).flatten(1)
    if not rows.isfinite().all():  # of a model that has diverged
        return math.nan
    values = torch.linalg.eigvalsh(rows @ rows.T)
    return (values.sum().square() / values.square().sum()).item()


@torch.no_grad()
def _loss_without(model: Any, input_ids: Tensor, stream: int) -> float:
    row_mask = torch.ones(model.streams, input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    row_mask[stream] = False
    with model.base_model.stream_state.using(row_mask=row_mask):
        return token_losses(model(input_ids=input_ids, use_cache=False).logits, input_ids).mean().item()


@torch.no_grad()
def _prefix_attention(model: Any, input_ids: Tensor) -> Float[Tensor, "l p t"]:
    """What share of each query token's attention goes to the prefix, mean over batch and heads: (layers, P, T)."""
    implementation, n = model.config._attn_implementation, model.base_model.stream_state.config.prefix_tokens
    model.set_attn_implementation("eager")
    try:
        attentions = model(input_ids=input_ids, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation(implementation.removeprefix(TAG))
    return torch.stack([split(a[..., :n].float().sum(-1).mean(1), model.streams).mean(1) for a in attentions])


def _gradient_share(model: Any, input_ids: Tensor) -> list[float]:
    p = model.streams
    banks = [
        parameter
        for name, parameter in stream_tensors(model).items()
        if is_diversifier(name) and parameter.requires_grad and parameter.shape[0] >= p > 1
    ]
    if not banks:
        return []
    loss = token_losses(model(input_ids=input_ids, use_cache=False).logits, input_ids).mean()
    gradients = torch.autograd.grad(loss, banks, allow_unused=True)  # banks that are generated get none
    squares = [g[:p].flatten(1).square().sum(1) for g in gradients if g is not None]
    if not squares:
        return []
    total = torch.stack(squares).sum(0)
    return (total / total.sum()).tolist()


def _bands(by_position: Float[Tensor, "p t"]) -> list[list[float]]:
    parts = by_position.float().tensor_split(min(BANDS, by_position.shape[1]), dim=1)
    return [part.mean(1).tolist() for part in parts]
