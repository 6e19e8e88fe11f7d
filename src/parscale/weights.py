"""Whether the weights that were loaded are all there, of the right shape, and numbers."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from parscale.errors import InputError
from parscale.streams.tensors import is_finite, listed, refuse

_OLD_BUFFERS = re.compile(r"(^|\.)(attn|attention)\.(bias|masked_bias)$|rotary_emb\.inv_freq$|(^|\.)position_ids$")
"""Causal masks and positions, which older transformers saved: the model makes its own."""
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")
_REMEDY = "Fetch the model again, or give one whose tensors fit its config.json"


def check_whole(model: nn.Module, info: Mapping[str, Any], source: object) -> None:
    """Refuse a model whose checkpoint is not exactly its own: transformers would start at random what is missing.

    Args:
        model: as it was loaded.
        info: `missing_keys`, `unexpected_keys` and `mismatched_keys`, as `from_pretrained(output_loading_info=True)`
            gives them. What is tied to a tensor that is there is in none of them.
        source: what messages call it.

    Raises:
        InputError: names the tensors that are missing, unexpected or of another shape.
    """
    buffers = {name for name, _ in model.named_buffers()}
    extra = [name for name in info["unexpected_keys"] if name not in buffers and not _OLD_BUFFERS.search(name)]
    refuse(source, info["missing_keys"], extra, info["mismatched_keys"], remedy=_REMEDY)


def check_quantized(model: nn.Module, source: object) -> None:
    """Refuse linear layers in few bits whose weight has another shape than the layer: the quantiser takes any.

    Raises:
        InputError: names the tensors.
    """
    misshaped = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            held: Any = getattr(module.weight, "quant_state", module.weight)  # 4 bits of bitsandbytes are packed
            expected = module.out_features, module.in_features
            if tuple(held.shape) != expected:
                misshaped.append((f"{name}.weight", held.shape, expected))
    refuse(source, [], [], misshaped, remedy=_REMEDY)


def check_experts(folder: Path, source: object) -> None:
    """Refuse a mixture whose experts do not all have the same tensors. transformers stacks them, and where it cannot,
    it does not say which one is to blame.

    Raises:
        InputError: names the tensors that are missing, or of another shape than the other experts'.
    """
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}  # pattern → expert → shape
    experts: dict[str, set[str]] = {}  # what is in front of the number → all numbers
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as held:
            for name in held.keys():  # noqa: SIM118 (not a mapping)
                if found := _EXPERT.fullmatch(name):
                    layer, number, tensor = found.groups()
                    shapes.setdefault(f"{layer}%s{tensor}", {})[number] = tuple(held.get_slice(name).get_shape())
                    experts.setdefault(layer, set()).add(number)
    missing, misshaped = [], []
    for pattern, of in shapes.items():
        usual = Counter(of.values()).most_common(1)[0][0]
        missing += [pattern % number for number in experts[pattern.partition("%s")[0]] - of.keys()]
        misshaped += [(pattern % number, shape, usual) for number, shape in of.items() if shape != usual]
    refuse(source, missing, [], misshaped, remedy=_REMEDY)


def check_finite(model: nn.Module, source: object) -> None:
    """Refuse a model with weights that are NaN or infinite. Weights that are not in memory are passed over.

    Raises:
        InputError: names the tensors.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    if broken := [name for name, tensor in named if not all(map(is_finite, _floats(tensor)))]:
        raise InputError(
            f"{source}: weights that are NaN or infinite, in {listed(broken)}. Give a checkpoint from before, or fetch "
            "the model again"
        )


def _floats(tensor: Tensor) -> Iterator[Tensor]:
    """What a weight consists of: itself, or the scales of one in few bits (torchao's, bitsandbytes')."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
            yield from _floats(getattr(tensor, name))
        return
    scales = getattr(tensor, "SCB", None), getattr(getattr(tensor, "quant_state", None), "absmax", None)
    for part in (tensor, *scales):
        if isinstance(part, Tensor) and part.is_floating_point() and not part.is_meta:
            yield part.detach()
