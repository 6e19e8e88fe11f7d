"""Scales on the projections per stream: W_p = diag(s_in)·W·diag(s_out) (BatchEnsemble, arXiv 2002.06715).

Not in the paper. On every projection that reads the hidden state lie `stream_scale_in` (P, in) and `stream_scale_out`
(P, out), the latter for the bias too. With `lora` as well, W_p = diag(s_in)·(W + A_p·B_p)·diag(s_out).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from parscale.config import StreamsConfig
from parscale.streams import around
from parscale.streams.diversify import projections
from parscale.streams.diversify.calibration import Calibration
from parscale.streams.hooked import stream_tensor
from parscale.streams.order import split
from parscale.streams.state import StreamState

SPREAD = 0.1
"""Standard deviation of the scales around 1 at the start; a tenth of it for a near-identity start."""


def scale(x: Float[Tensor, "pb ... d"], scales: Float[Tensor, "p d"]) -> Float[Tensor, "pb ... d"]:
    """Multiply the features of every stream's rows by its scales."""
    by_stream = split(x, scales.shape[0])  # (p, B, …, d)
    factors = scales.to(x.dtype).view(scales.shape[0], *[1] * (x.ndim - 1), -1)
    return (by_stream * factors).flatten(0, 1)


def check(model: Any, calibration: Calibration, config: StreamsConfig) -> None:
    """The model needs projections of the hidden state."""
    projections.find(model)


def attach(model: Any, state: StreamState) -> None:
    """Give every projection its scales, uninitialised, and use them."""
    for name, projection in projections.find(model).items():
        streams = projections.streams_at(name, state.config)
        (size_in, size_out), place = projections.sizes(projection), projections.place_of(projection, model)
        projection.stream_state = state
        projection.stream_scale_in = nn.Parameter(torch.empty(streams, size_in, **place))
        projection.stream_scale_out = nn.Parameter(torch.empty(streams, size_out, **place))
        around.add(projection, "rank1", _scale_input, _scale_output)


def detach(model: Any) -> None:
    """Take the scales away."""
    for module in model.base_model.modules():
        if hasattr(module, "stream_scale_in"):
            around.remove(module, "rank1")
            del module.stream_scale_in, module.stream_scale_out


@torch.no_grad()
def init(model: Any, calibration: Calibration) -> None:
    """Scales around 1. Exactly 1 would make streams that start alike, and stay so."""
    near_identity = model.base_model.stream_state.config.prefix_init == "near_identity"
    for module in model.base_model.modules():
        _start(module, SPREAD / 10 if near_identity else SPREAD)


def reset(module: nn.Module, std: float) -> None:
    """Scales around 1."""
    _start(module, SPREAD)


def _start(module: Any, spread: float) -> None:
    for name in ("stream_scale_in", "stream_scale_out"):
        if isinstance(scales := getattr(module, name, None), nn.Parameter):
            initialization.normal_(scales, mean=1.0, std=spread)


def _scale_input(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    x, *others = args
    scales = stream_tensor(module, "stream_scale_in", x)
    return projections.by_stream(scale, module.stream_state, (x,), (scales,)), *others


def _scale_output(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    scales = stream_tensor(module, "stream_scale_out", output)
    return projections.by_stream(scale, module.stream_state, (output,), (scales,))
