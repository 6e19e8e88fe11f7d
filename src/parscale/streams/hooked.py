"""Modules that another library has hooked: their `forward` lies on the instance, or their weights lie elsewhere.

Knows how accelerate does both (`dispatch_model`, `cpu_offload`, `disk_offload`, a `device_map`), so that streams
compute the same whether they or the hooks came first. A model that is hooked in a way unknown here is refused.
"""

from types import MethodType
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from parscale.errors import InputError

_SHARDED = ("device_mesh", "ds_id", "_is_flat_param")
"""What only parameters have that are a DTensor (FSDP2, tensor parallelism), of DeepSpeed's ZeRO-3, or of FSDP1."""
_FIRST = "give the model streams first, and wrap, compile or prepare it then"


def check_unhooked(model: Any) -> None:
    """Refuse a model that another library has taken hold of in a way that streams would not reach, or would not follow.

    Raises:
        InputError: its weights are sharded over processes or lie elsewhere between passes; or its backbone is wrapped,
            or has a `forward` on the instance that is not accelerate's.
    """
    name, backbone = type(model).__name__, model.base_model
    if any(hasattr(parameter, mark) for parameter in model.parameters() for mark in _SHARDED):
        raise InputError(f"{name} is sharded over processes; give it streams first, and shard it then")
    if not isinstance(backbone, PreTrainedModel):
        raise InputError(f"{name}: its backbone is wrapped in {type(backbone).__name__}; {_FIRST}")
    forward = vars(backbone).get("forward")
    if forward is not None and not _is_of_class(backbone, forward) and not _is_hooked(backbone, forward):
        raise InputError(f"{name}: its backbone has been given another forward, which would run no streams; {_FIRST}")
    check_in_memory(model, "giving it streams")


def run_new_class(module: Any) -> None:
    """After the class of a module was swapped: let the `forward` that lies on the instance run the new class's.

    accelerate keeps the old class's bound method inside its hook, and leaves it on the instance when the hook goes.
    """
    forward = vars(module).get("forward")
    if forward is None:
        return
    if _is_of_class(module, forward):
        del module.forward
    elif _is_hooked(module, forward):
        module._old_forward = forward.__wrapped__ = MethodType(type(module).forward, module)


def stream_tensor(module: Any, name: str, like: Tensor) -> Tensor:
    """A parameter of the streams on `module`, on the device of `like`.

    Streams compute around a projection's `forward`. accelerate has an offloaded module's weights there within it alone.
    """
    tensor = getattr(module, name)
    if tensor.is_meta:
        tensor = _offloaded(module, name, tensor)
    return tensor.to(like.device)


def check_in_memory(model: nn.Module, purpose: str) -> None:
    """Refuse a model whose weights are not in memory between passes.

    Args:
        purpose: what needs them.

    Raises:
        InputError: names the model and the way out.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        remedy = "load its weights first"
        if any(hasattr(module, "_hf_hook") for module in model.modules()):
            remedy = "accelerate has offloaded them; offload after it, or call remove_hook_from_submodules(model) first"
        raise InputError(
            f"{type(model).__name__} has parameters on the meta device, and {purpose} needs them: {remedy}"
        )


def _is_of_class(module: nn.Module, forward: Any) -> bool:
    """Whether it is what the class would give, put on the instance."""
    function = getattr(forward, "__func__", None)
    return function is not None and any(vars(kind).get("forward") is function for kind in type(module).__mro__)


def _is_hooked(module: Any, forward: Any) -> bool:
    """Whether it is accelerate's, around what the class would give."""
    inner = vars(module).get("_old_forward")
    return inner is not None and getattr(forward, "__wrapped__", None) == inner and _is_of_class(module, inner)


def _offloaded(module: Any, name: str, tensor: Tensor) -> Tensor:
    """From where accelerate's hook on the module fetches it; as it is where none does, as in a run for shapes alone."""
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "offload", False):
            return one.weights_map[name]
    return tensor
