"""The streams' own tensors: how a name tells them from the base's, and how a checkpoint with wrong ones is refused."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from parscale.errors import InputError

_LISTED = 8
_REMEDY = (
    "Give one whose tensors fit its config.json; to run fewer streams, load as it is and call set_streams(p); a plain "
    "model gets streams by parallelize()"
)


def belongs_to_streams(name: str) -> bool:
    """Whether `parallelize` added the parameter of this name: a prefix, a stream's vector, or the aggregation head."""
    return any(
        part.startswith("stream_") or part in ("prefix_k", "prefix_v", "prefix_generator", "aggregate_layer")
        for part in name.split(".")
    )


def stream_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, for what a checkpoint keeps of the streams. A prefix generator is not kept: its output is."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if belongs_to_streams(name) and "prefix_generator" not in name.split(".")
    }


def is_wrapped(model: nn.Module) -> bool:
    """Whether `peft` has wrapped modules of it: they have other names then, and weights that are the base's alone."""
    return any(hasattr(module, "base_layer") for module in model.modules())


def check_shapes(expected: Mapping[str, Iterable[int]], found: Mapping[str, Iterable[int]], source: object) -> None:
    """Refuse a checkpoint whose stream tensors are not exactly the expected ones.

    Raises:
        InputError: names the missing tensors, the extra ones, and those of another shape.
    """
    refuse(
        source,
        missing=expected.keys() - found.keys(),
        extra=found.keys() - expected.keys(),
        misshaped=[
            (name, found[name], expected[name])
            for name in expected.keys() & found.keys()
            if tuple(found[name]) != tuple(expected[name])
        ],
    )


def refuse(
    source: object,
    missing: Iterable[str],
    extra: Iterable[str],
    misshaped: Iterable[tuple[str, Iterable[int], Iterable[int]]],
    remedy: str = _REMEDY,
) -> None:
    """Raise InputError if anything is given. `misshaped` holds (name, shape in the checkpoint, shape expected)."""
    shapes = [f"{name} {tuple(has)} instead of {tuple(wants)}" for name, has, wants in misshaped]
    complaints = [
        f"{what} {listed(names)}"
        for what, names in (("lacks", list(missing)), ("has unexpected", list(extra)), ("has", shapes))
        if names
    ]
    if complaints:
        raise InputError(f"{source}: the checkpoint {'; it '.join(complaints)}. {remedy}")


def check_readable(files: Iterable[Path]) -> None:
    """Refuse safetensors files that are corrupt or cut short.

    Raises:
        InputError: names the first such file.
    """
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise InputError(f"{file}: corrupt or cut short, fetch it again ({error})") from None


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a floating point tensor of any shape are numbers."""
    if not tensor.numel():
        return True
    low, high = torch.aminmax(tensor.float() if tensor.dtype.itemsize == 1 else tensor)
    return bool(low.isfinite() and high.isfinite())


def listed(names: list[str]) -> str:
    """The first few names in their order, and how many more there are."""
    shown = sorted(names)[:_LISTED]
    return ", ".join(shown) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")
