"""Which projections of a model carry parameters of their own for every stream: all that read the hidden state.

Those are queries, keys and values, and the first half of the MLP, fused or not. They are found by structure: a linear
module inside a decoder layer, as wide at its input as the hidden state, that neither routes nor is one of many experts
(its rows would be the tokens routed to it, in no order of streams), nor projects back into the hidden state.
"""

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.streams.kv import KEYS_AND_VALUES
from parscale.streams.order import divide_tail, first_stream, join_tail
from parscale.streams.state import StreamState

_BACK_TO_HIDDEN = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "wo", "w2", "fc2", "fc_out")
_ROUTERS = ("gate", "router", "shared_expert_gate")


def find(model: Any) -> dict[str, Any]:
    """Name within the backbone → projection, in the model's order.

    Raises:
        InputError: there are none.
    """
    backbone, hidden_size = model.base_model, model.config.hidden_size
    found = {
        f"{layer_name}.{name}": module
        for layer_name, layer in backbone.named_modules()
        if isinstance(layer, GradientCheckpointingLayer)
        for name, module in layer.named_modules()
        if _reads_hidden_state(name.split("."), module, hidden_size)
    }
    if not found:
        raise InputError(
            f"{type(model).__name__}: none of its decoder layers has a linear projection of the hidden state "
            f"({hidden_size} features), so 'lora' and 'rank1' cannot be in diversify; use 'prefix' or 'embedding'"
        )
    return found


def streams_at(name: str, config: StreamsConfig) -> int:
    """How many entries a bank at the projection of this name has: with shared keys and values stream 0 alone makes
    them, and none is needed where it is to be plain."""
    if config.kv == "shared" and name.rpartition(".")[2] in KEYS_AND_VALUES:
        return 0 if config.plain_first else 1
    return config.streams


def by_stream(
    function: Callable[..., Tensor], state: StreamState, rows: tuple[Tensor, ...], banks: tuple[Tensor, ...]
) -> Tensor:
    """function(*rows, *banks) with the entries of the streams that the rows, (P·B, …), are of, or the only one; with
    `plain_first`, of stream 0's rows the first ones given as they are. Where other streams' tokens stand behind stream
    0's prompt, each part gets its own."""
    run = state.run
    own, plain, tail = run.local_streams, state.config.plain_first, run.tail
    if tail and rows[0].ndim == 2:  # a mixture's MLP flattens (B, T)
        rows = tuple(x.unflatten(0, (tail.batch, -1)) for x in rows)
        return by_stream(function, state, rows, banks).flatten(0, 1)
    if tail and len(banks[0]) > 1:
        prompts, last = zip(*(divide_tail(x, tail) for x in rows), strict=True)
        others = slice(1, 1 + tail.streams)
        first = prompts[0] if plain else function(*prompts, *(b[:1] for b in banks))
        return join_tail(first, function(*last, *(b[others] for b in banks)))
    if not plain or own.start > 0:
        return function(*rows, *(bank[own] if len(bank) > 1 else bank for bank in banks))
    first = first_stream(rows[0], own.stop)
    if own.stop == 1:
        return first
    rest = function(*(x[len(first) :] for x in rows), *(bank[1 : own.stop] for bank in banks))
    return torch.cat([first, rest])


def sizes(projection: Any) -> tuple[int, int]:
    """Features that a projection takes and gives. A quantised one tells them as nn.Linear does."""
    if isinstance(projection, Conv1D):
        return projection.nx, projection.nf
    return projection.in_features, projection.out_features


def place_of(module: nn.Module, model: Any) -> dict[str, Any]:
    """Device and dtype of parameters beside a module: the model's dtype, for its own weights may be quantised, or
    buffers."""
    return {"device": next(chain(module.parameters(), module.buffers())).device, "dtype": model.dtype}


def _reads_hidden_state(path: list[str], module: nn.Module, hidden_size: int) -> bool:
    linear = isinstance(module, Conv1D) or (hasattr(module, "in_features") and hasattr(module, "out_features"))
    return (
        linear
        and sizes(module)[0] == hidden_size
        and path[-1] not in _BACK_TO_HIDDEN + _ROUTERS
        and "experts" not in path
    )
