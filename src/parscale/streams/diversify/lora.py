"""A low-rank update of the projections per stream: W_p = W + A_p·B_p, rank r (LoRA, arXiv 2106.09685, one per stream).

Not in the paper. On every projection that reads the hidden state lie `stream_lora_a` (P, in, r) and `stream_lora_b`
(P, r, out), or on those that `lora_targets` names. The P updates of an input are two batched products; P weights are
never made.

With `plain_first` stream 0 has none: its entries are there, so that entry i is stream i's, and stay as they start.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.streams import around
from parscale.streams.diversify import projections
from parscale.streams.diversify.calibration import Calibration
from parscale.streams.hooked import stream_tensor
from parscale.streams.order import split
from parscale.streams.state import StreamState


def add_update(
    output: Float[Tensor, "pb ... o"],
    x: Float[Tensor, "pb ... i"],
    a: Float[Tensor, "p i r"],
    b: Float[Tensor, "p r o"],
) -> Float[Tensor, "pb ... o"]:
    """output_p + x_p·A_p·B_p for the rows of every stream."""
    low = _by_stream(x, a.shape[0]) @ a.to(x.dtype)  # (p, B·T, r)
    added = torch.baddbmm(_by_stream(output, a.shape[0]), low.to(output.dtype), b.to(output.dtype))
    return added.view(output.shape)


def check(model: Any, calibration: Calibration, config: StreamsConfig) -> None:
    """The model needs projections of the hidden state, of the names that are asked for."""
    _targets(model, config)


def attach(model: Any, state: StreamState) -> None:
    """Give every projection its factors, uninitialised, and use them."""
    rank = state.config.lora_rank
    for name, projection in _targets(model, state.config).items():
        streams = streams_at(name, state.config)
        if streams == 0:
            continue
        (size_in, size_out), place = projections.sizes(projection), projections.place_of(projection, model)
        projection.stream_state = state
        projection.stream_lora_a = nn.Parameter(torch.empty(streams, size_in, rank, **place))
        projection.stream_lora_b = nn.Parameter(torch.empty(streams, rank, size_out, **place))
        around.add(projection, "lora", after=_use_update)


def streams_at(name: str, config: StreamsConfig) -> int:
    """How many entries the factors at the projection of this name have; 0 where it has none."""
    wanted = not config.lora_targets or name.rpartition(".")[2] in config.lora_targets
    return projections.streams_at(name, config) if wanted else 0


def detach(model: Any) -> None:
    """Take the factors away."""
    for module in model.base_model.modules():
        if hasattr(module, "stream_lora_a"):
            around.remove(module, "lora")
            del module.stream_lora_a, module.stream_lora_b


@torch.no_grad()
def init(model: Any, calibration: Calibration) -> None:
    """Random A, zero B: the model's own predictions at step 0, and another gradient for every stream's B."""
    for module in model.base_model.modules():
        _start(module)


def reset(module: nn.Module, std: float) -> None:
    """Random A, zero B."""
    _start(module)


def _targets(model: Any, config: StreamsConfig) -> dict[str, Any]:
    """Projections by name, all of them where every one that is asked for is there.

    Raises:
        InputError: one is not, or those that are asked for have factors for the first stream alone.
    """
    found = projections.find(model)
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in found))
    if missing := [target for target in config.lora_targets if target not in leaves]:
        raise InputError(
            f"lora_targets {', '.join(missing)}: {type(model).__name__} has no such projection of the hidden state; "
            f"it has {', '.join(leaves)}"
        )
    if config.streams > 1 and all(streams_at(name, config) < config.streams for name in found):
        raise InputError(
            f"lora_targets {', '.join(config.lora_targets)} with kv='shared': only the first stream makes keys and "
            "values, so no other one would have a LoRA; name another projection as well"
        )
    return found


def _start(module: Any) -> None:
    """A ~ N(0, 1/in), B = 0, as in LoRA."""
    if isinstance(a := getattr(module, "stream_lora_a", None), nn.Parameter):
        initialization.normal_(a, std=a.shape[1] ** -0.5)
        initialization.zeros_(module.stream_lora_b)


def _use_update(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    banks = stream_tensor(module, "stream_lora_a", output), stream_tensor(module, "stream_lora_b", output)
    rows = output, args[0].to(output.device)
    return projections.by_stream(add_update, module.stream_state, rows, banks)


def _by_stream(x: Float[Tensor, "pb ... d"], streams: int) -> Float[Tensor, "p n d"]:
    return split(x, streams).flatten(1, -2)
