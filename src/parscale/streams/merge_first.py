"""The first stream's LoRA merged into the weights of the backbone, so that a prompt passes the weights alone.

With shared keys and values a prompt is read by the first stream. Its update A_0·B_0 can be a part of W; what the other
streams have is then a difference to it, of twice the rank: W + A_p·B_p = (W + A_0·B_0) + [A_p, A_0]·[B_p; −B_0].
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parscale.errors import InputError
from parscale.streams.backbone import has_streams, streams_of
from parscale.streams.checkpoint import Adapter, check_unwrapped, held_streams, install
from parscale.streams.tensors import stream_tensors

_A, _B = ".stream_lora_a", ".stream_lora_b"


@torch.no_grad()
def merge_first(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the first stream's LoRA into the backbone's weights, in place; predictions stay what they were.

    The model then has `plain_first=True` and LoRAs of twice the rank. In half precision the merged weights are rounded,
    as with any LoRA: merge in float32 to have the same predictions to the last digits. All streams are active
    afterwards. The backbone is another one than the streams were trained on: keep the model whole from here on
    (`save_pretrained`), and start training again with a new optimizer.

    Args:
        model: a causal LM with a LoRA for each stream, alone or beside a prefix.

    Returns:
        The same object.

    Raises:
        InputError: no LoRA, one that is merged already, or diversifiers that cannot be merged beside it; quantised
            weights; several sets of streams on one backbone, or a LoRA of `peft`. The model is then as it was.
    """
    _check(model)
    [(kept, streams)] = held_streams(model).items()
    tensors, weights = dict(streams.tensors), {}
    for owner in _owners(tensors):
        a, b = tensors.pop(owner + _A), tensors.pop(owner + _B)
        weights[owner] = _added(model.get_submodule(owner), a[0], b[0])
        if len(a) > 1:
            tensors[owner + _A] = nn.Parameter(torch.cat([a, a[:1].expand_as(a)], dim=2))
            tensors[owner + _B] = nn.Parameter(torch.cat([b, -b[:1].expand_as(b)], dim=1))
    for owner, weight in weights.items():
        model.get_parameter(owner + ".weight").copy_(weight)
    changed = {"plain_first": True, "lora_rank": 2 * streams_of(model).lora_rank}
    merged = Adapter(streams.entries | {"parscale": streams.entries["parscale"] | changed}, tensors)
    install(model, merged)
    model.base_model.stream_adapters = {kept: merged}  # type: ignore[assignment]
    return model


def _owners(tensors: Iterable[str]) -> list[str]:
    """Names of the projections that have a LoRA."""
    return [name.removesuffix(_A) for name in tensors if name.endswith(_A)]


def _added(projection: Any, a: Tensor, b: Tensor) -> Tensor:
    """W + A·B, summed in float32 or better."""
    weight = projection.weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    update = a.to(wide) @ b.to(wide)
    return weight.to(wide) + (update if isinstance(projection, Conv1D) else update.T)


def _check(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not has_streams(model) or "lora" not in streams_of(model).diversifiers:
        raise InputError(f"{name} has no LoRA for its first stream; train one with diversify=('prefix', 'lora')")
    check_unwrapped(model)
    settings = streams_of(model)
    if settings.plain_first:
        raise InputError(f"{name}: its first stream has no LoRA (plain_first=True); there is nothing to merge")
    if beside := set(settings.diversifiers) - {"prefix", "lora"}:
        raise InputError(f"{name}: the first stream has {sorted(beside)} beside its LoRA, which cannot be merged")
    if len(held := held_streams(model)) > 1:
        raise InputError(
            f"{name} holds several sets of streams, {sorted(held)}, on one backbone; load one of them alone"
        )
    for owner in _owners(stream_tensors(model)):
        weight: Any = getattr(model.get_submodule(owner), "weight", None)
        if weight is None or not weight.is_floating_point() or is_traceable_wrapper_subclass(weight):
            raise InputError(f"{owner}: its weights are quantised, and would lose the update; merge before quantising")
