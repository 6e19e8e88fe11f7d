"""What is asked of a trained model beside its loss: each stream alone, other ways to merge, fewer streams, the errors
against the control, and how all of it goes with the place in the sequence."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from parscale.probe import token_losses, unmerged
from parscale.probe_details import BANDS, probe_details
from parscale.streams.backbone import has_streams
from parscale.streams.diversify.calibration import evaluating
from parscale.streams.order import split

DETAILED = 8
"""Rows that the closer look, which needs attention weights and gradients, is given."""


def measure(model: Any, input_ids: Int[Tensor, "b t"], *, control: Any = None, rows: int = 16) -> dict[str, Any]:
    """Losses in nats per token over the same tokens; {} for a model with one stream.

    Keys: `merged`; `at` (p → loss with the first p streams); `alone` (P losses); `uniform` (the mean of the hidden
    states: with a linear LM head also the mean of the logits); `probabilities` (the mean of the streams' predictions);
    `rho` and `rho_by_position` (correlation of the streams' errors against `control`'s losses, None without one);
    `gain_by_position` (the control's losses less the merged ones);
    `weights`, `cosine`, `effective_streams`, `prefix_attention_by_position`, `weights_by_position`.
    """
    if not has_streams(model) or model.streams == 1:
        return {}
    device, p, state = model.device, model.streams, model.base_model.stream_state
    chunks = [chunk.to(device) for chunk in input_ids.split(rows)]
    counts = sorted({1 << i for i in range(p.bit_length()) if 1 << i <= p} | {p})
    with evaluating(model), torch.no_grad():
        alone = torch.cat([_alone(model, chunk) for chunk in chunks], dim=1)  # (P, B, T-1)
        at = {}
        for count in counts:
            with state.using(streams=count):
                at[str(count)] = _mean_loss(model, chunks)
        with state.using(smoothing=1.0):
            uniform = _mean_loss(model, chunks)
    errors, gains = None, []
    if control is not None:
        with evaluating(control), torch.no_grad():
            theirs = torch.cat([token_losses(control(input_ids=c, use_cache=False).logits, c) for c in chunks])
            merged = torch.cat([token_losses(model(input_ids=c, use_cache=False).logits, c) for c in chunks])
        errors = alone - theirs
        gains = [band.mean().item() for band in (theirs - merged).tensor_split(BANDS, dim=1)]
    details = probe_details(model, chunks[0][:DETAILED])
    seen = details.probe
    return {
        "merged": at[str(p)],
        "at": at,
        "alone": alone.mean((1, 2)).tolist(),
        "uniform": uniform,
        "probabilities": -(-alone).exp().mean(0).log().mean().item(),
        "rho": None if errors is None else correlation(errors),
        "rho_by_position": [] if errors is None else [correlation(e) for e in errors.tensor_split(BANDS, dim=2)],
        "gain_by_position": gains,
        "weights": seen.weights,
        "cosine": seen.cosine,
        "effective_streams": seen.effective_streams,
        "prefix_attention_by_position": details.prefix_attention_by_position,
        "weights_by_position": details.weights_by_position,
    }


def correlation(errors: Float[Tensor, "p b t"]) -> float:
    """Mean Pearson correlation, over tokens, of two streams' errors."""
    pairs = torch.corrcoef(errors.flatten(1).double())
    p = pairs.shape[0]
    return ((pairs.sum() - pairs.trace()) / (p * (p - 1))).item()


def _alone(model: Any, chunk: Tensor) -> Float[Tensor, "p b t"]:
    p = model.streams
    with unmerged(model):
        logits = model(input_ids=chunk, use_cache=False).logits
    return split(token_losses(logits, chunk.repeat(p, 1)), p)


def _mean_loss(model: Any, chunks: list[Tensor]) -> float:
    losses = [token_losses(model(input_ids=chunk, use_cache=False).logits, chunk) for chunk in chunks]
    return torch.cat(losses).mean().item()
