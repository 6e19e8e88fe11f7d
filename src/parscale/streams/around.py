"""What streams compute around a projection, before and after it: it belongs to the projection's place in the model.

Other libraries put modules of their own in that place, around the projection, as peft does with its layers. The
streams then compute around that module, and around the projection again when it is back. So an adapter is a part of the
weight that the streams start from, and merging it changes nothing. A module that takes the projection's place without
holding it, as a quantised one does, gets its streams.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from parscale.streams.tensors import belongs_to_streams

Before = Callable[[Any, tuple[Any, ...]], tuple[Any, ...]]
"""(projection, its arguments) → the arguments in their place."""
After = Callable[[Any, tuple[Any, ...], Tensor], Tensor]
"""(projection, what it was called with, its output) → the output in its place."""


class Around(NamedTuple):
    """One computation around a projection. Either part may be None."""

    before: Before | None
    after: After | None


def add(projection: Any, name: str, before: Before | None = None, after: After | None = None) -> None:
    """Compute this around a projection too, outside of what is there already.

    Args:
        projection: a linear module. It owns the streams' tensors; the functions are called with it.
        name: what `remove` calls it.
        before: changes the arguments.
        after: changes the output; it sees the arguments that the projection saw.
    """
    if "stream_around" not in vars(projection):
        projection.stream_around = {}
        _put_on(projection, projection)
    projection.stream_around[name] = Around(before, after)


def remove(projection: Any, name: str) -> None:
    """Undo `add`; nothing happens where nothing was added."""
    around = vars(projection).get("stream_around", {})
    around.pop(name, None)
    if not around and "stream_around" in vars(projection):
        del projection.stream_around
        _take_off(projection)


def _put_on(place: Any, owner: nn.Module) -> None:
    vars(place)["stream_owner"] = owner  # not by setattr, which would make it a submodule
    place.stream_hooks = (
        place.register_forward_pre_hook(partial(_run_before, owner)),
        place.register_forward_hook(partial(_run_after, owner)),
        owner.register_state_dict_post_hook(_add_to_state_dict),
    )


def _take_off(place: Any) -> None:
    for hook in place.stream_hooks:
        hook.remove()
    del place.stream_hooks, place.stream_owner


def _run_before(owner: Any, place: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    for around in reversed(owner.stream_around.values()):
        if around.before is not None:
            args = around.before(owner, args)
    return args


def _run_after(owner: Any, place: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    for around in owner.stream_around.values():
        if around.after is not None:
            output = around.after(owner, args, output)
    return output


def _add_to_state_dict(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Some quantised projections write their own tensors alone."""
    for name, parameter in owner.named_parameters(recurse=False):
        if belongs_to_streams(name):
            state.setdefault(prefix + name, parameter.detach())


def _follow(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    """Before `module` takes the place of `parent.name`: let what was around that one be around it."""
    before = parent._modules.get(name)
    owner = None if before is None else vars(before).get("stream_owner")
    if owner is None or module is None or module is before:
        return
    _take_off(before)
    if not any(part is owner for part in module.modules()):
        _hand_over(owner, module)
        owner = module
    _put_on(module, owner)


def _hand_over(owner: Any, module: Any) -> None:
    """Let another projection own the streams' tensors: the same one quantised, dequantised or converted to fp8."""
    for name, parameter in list(owner.named_parameters(recurse=False)):
        if belongs_to_streams(name):
            delattr(owner, name)
            module.register_parameter(name, parameter)
    module.stream_state, module.stream_around = owner.stream_state, owner.stream_around
    del owner.stream_state, owner.stream_around


register_module_module_registration_hook(_follow)
