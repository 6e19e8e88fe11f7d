"""Whose keys and values the streams attend to: each its own (the paper), or all of them stream 0's (`kv="shared"`).

Not in the paper. With shared ones an attention module still sees the P·B rows of all streams, but projects keys and
values from stream 0's alone, and the KV cache holds B rows: to an engine it is grouped-query attention with P times the
query heads. A prompt needs stream 0 alone, for what the others compute there is read by nobody.
"""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from parscale.errors import InputError
from parscale.streams import around
from parscale.streams.diversify.calibration import Calibration
from parscale.streams.order import Tail, duplicate, first_stream, repeat_at
from parscale.streams.state import Run, StreamState

KEYS_AND_VALUES = ("k_proj", "v_proj")
"""Projections that run for stream 0 alone. Where queries, keys and values are one fused matrix, all rows pass it, and
the other streams' keys and values are dropped."""


FILLED_BY = "parscale_streams"
"""Attribute of a cache: p of the pass that wrote to it last, where each stream has keys and values of its own."""


class FirstStreamCache:
    """What an attention module is given in the KV cache's place: stream 0's rows are written, all else is dropped.
    Modules call nothing but `update`.
    """

    def __init__(self, inner: Cache, streams: int, tail: Tail | None) -> None:
        self.inner = inner
        self.streams = streams
        self.tail = tail

    def update(
        self, key_states: Float[Tensor, "pb h t d"], value_states: Float[Tensor, "pb h t e"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s e"]]:
        """Write this step's keys and values of stream 0; return all that the batch attends to."""
        key, value = before_tail(*of_first_stream(key_states, value_states, self.streams), self.tail)
        return self.inner.update(key, value, *args, **kwargs)


def of_first_stream(key: Tensor, value: Tensor, streams: int) -> tuple[Tensor, Tensor]:
    """Keys and values of stream 0: (P·B, …) → (B, …)."""
    return first_stream(key, streams), first_stream(value, streams)


def before_tail(key: Tensor, value: Tensor, tail: Tail | None) -> tuple[Tensor, Tensor]:
    """Those of stream 0's prompt alone: (B, H, T + k·r, …) → (B, H, T, …)."""
    tokens = key.shape[2] - (tail.length if tail is not None else 0)
    return key[:, :, :tokens], value[:, :, :tokens]


def check_cache(cache: Any, state: StreamState, batch: int) -> None:
    """Refuse a cache that the streams of this pass have not filled. Its first layer would fail over sizes of tensors,
    or go on where another p with another batch makes as many rows.

    Args:
        cache: what the pass is given.
        state: the model's, in the pass.
        batch: B, rows of the input.

    Raises:
        InputError: names what filled it, or the rows it has and should have, and the remedy.
    """
    run, rows = state.run, cached_rows(cache)
    if rows is None or run.first_pass is not None:  # that one selects rows itself
        return
    own = state.config.kv == "own"
    needed, filled_by = (run.n_local if own else 1) * batch, getattr(cache, FILLED_BY, None) if own else None
    if filled_by not in (None, run.streams) and int(cache.get_seq_length()) > 0:
        raise InputError(
            f"past_key_values was filled by {filled_by} streams, and {run.streams} run now: call "
            f"set_streams({filled_by}), or start a new cache"
        )
    if rows != needed:
        problem = f"past_key_values has {rows} rows, and {run.streams} streams of a batch of {batch} need {needed}"
        if filled_by == run.streams:
            raise InputError(f"{problem}: select row b of a batch of B as the rows p·B + b of all streams p")
        raise InputError(f"{problem} with kv={state.config.kv!r}: they did not fill it, start a new cache")


def mark_cache(cache: Any, state: StreamState) -> None:
    """Note on a cache that has a row for every stream how many streams filled it."""
    if state.config.kv == "own" and isinstance(cache, Cache) and not torch.compiler.is_compiling():
        setattr(cache, FILLED_BY, state.run.streams)


def cached_rows(cache: Any) -> int | None:
    """How many rows a cache holds; None of an empty one, and of one that is all quantised."""
    for layer in cache.layers if isinstance(cache, Cache) else ():
        keys = getattr(layer, "keys", None)  # recurrent layers have none
        if keys is not None and keys.ndim == 4:
            return keys.shape[0]
    return None


def check(model: Any, calibration: Calibration) -> None:
    """Every layer has to attend to keys and values. A recurrent state, of another stream each, cannot be shared.

    Raises:
        InputError: the model has layers of another kind.
    """
    layers = model.config.num_hidden_layers
    if len(calibration.layers) < layers:
        raise InputError(
            f"{type(model).__name__}: only {len(calibration.layers)} of its {layers} layers attend to keys and values, "
            "the others keep a state of their own for every stream; use kv='own'"
        )
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in DynamicCache(config=model.config).layers):
        raise InputError(
            f"{type(model).__name__}: beside attention its layers keep a recurrent state, of another value for every "
            "stream; use kv='own'"
        )


def attach(model: Any, attention: list[str]) -> None:
    """Let the named attention modules share, and the prompt be read by stream 0 alone. After the diversifiers' hooks:
    what theirs add to a projection is added for stream 0 too, before the result is given to all.
    """
    backbone = model.base_model
    hooks: list[Any] = []
    for name in attention:
        module = backbone.get_submodule(name)
        module.stream_state = backbone.stream_state
        hooks.append(module.register_forward_pre_hook(_write_first_stream, with_kwargs=True))
        for projection in (child for leaf, child in module.named_children() if leaf in KEYS_AND_VALUES):
            projection.stream_state = backbone.stream_state
            around.add(projection, "kv", _take_first_stream, _give_to_all)
    backbone.stream_kv_hooks = hooks


def detach(model: Any) -> None:
    """Undo `attach`; nothing happens where nothing is attached."""
    for hook in vars(model.base_model).pop("stream_kv_hooks", []):
        hook.remove()
    for module in model.base_model.modules():
        around.remove(module, "kv")


def run_prompt_by_first_stream(model: Any, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before the causal LM runs several streams over a prompt of which only the last logits are asked for: run stream 0
    over what comes before them, into the cache, and leave the rest to all streams. The same logits and the same cache.

    Returns:
        What is left: the run, the arguments, the keyword arguments.
    """
    if kwargs.get("cache") is not None:
        return _packed_by_first_stream(model, run, args, kwargs)
    keep, cache = kwargs.get("logits_to_keep", 0), kwargs.get("past_key_values")
    name = "input_ids" if kwargs.get("inputs_embeds") is None else "inputs_embeds"
    inputs, mask, positions = kwargs.get(name), kwargs.get("attention_mask"), kwargs.get("position_ids")
    others = {key: x for key, x in kwargs.items() if key not in _DIVIDED and x is not None and x is not False}
    if (
        not (run.streams > 1 or run.adaptive)
        or torch.is_grad_enabled()
        or args
        or inputs is None
        or not isinstance(keep, int)
        or not 0 < keep < inputs.shape[1]
        or not (kwargs.get("use_cache") or cache is not None)
        or others.keys() - _HARMLESS
        or model.config.output_hidden_states
        or not _is_divisible(mask, cache)
    ):
        return run, args, kwargs
    if isinstance(mask, dict) and None in mask.values():
        mask = None  # transformers leaves out what is causal anyway, for all tokens together: not so for the last ones
    cache = DynamicCache(config=model.config) if cache is None else cache
    in_one_pass = keep == 1 and run.streams > 1 and name == "input_ids" and (positions is not None or mask is None)
    if in_one_pass and _keeps_order(model, cache):
        last_place = torch.tensor([inputs.shape[1] - 1], device=inputs.device)
        tail = Tail(run.streams - 1, inputs.shape[0], last_place)
        return replace(run, streams=1, tail=tail), args, kwargs | _with_tail(inputs, mask, positions, cache, tail)
    before, last = slice(None, -keep), slice(-keep, None)
    model.base_model.stream_state.announce(
        replace(run, streams=1, hidden=None),
        model.base_model,
        **{name: inputs[:, before]},
        attention_mask=_rows_of_mask(mask, before, cut=not cache.is_compileable),
        position_ids=None if positions is None else positions[..., before],
        past_key_values=cache,
        use_cache=True,
    )
    divided = {
        name: inputs[:, last],
        "attention_mask": _rows_of_mask(mask, last, cut=False),
        "position_ids": None if positions is None else positions[..., last],
        "past_key_values": cache,
    }
    return run, args, kwargs | divided


def _packed_by_first_stream(model: Any, run: Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a step of continuous batching, (1, T) with the tokens of many requests, in which part of a prompt is: run
    stream 0 over all of it, and the others only where something is predicted. The same logits, and the same cache."""
    ids, ends = kwargs["input_ids"], kwargs.get("logits_to_keep")
    if (
        run.streams == 1
        or args
        or not isinstance(ends, Tensor)
        or len(ends) == ids.shape[1]  # nothing but last tokens: all streams run over all of it
        or not _computes_as_decode(model)
    ):
        return run, args, kwargs
    tail = Tail(run.streams - 1, 1, ends)
    repeated = {name: repeat_at(kwargs[name], tail) for name in ("input_ids", "position_ids")}
    # The rest is left out before it gets there.
    return replace(run, streams=1, tail=tail), args, kwargs | repeated | {"logits_to_keep": 0}


def _with_tail(
    ids: Int[Tensor, "b t"], mask: Any, positions: Tensor | None, cache: Cache, tail: Tail
) -> dict[str, Any]:
    """Stream 0's prompt with the last token once more for each other stream, at the same position: one pass instead of
    two. A mask (B, S) counts the tokens behind the prompt as well; of one (B, 1, T, S) their row is the last."""
    if positions is None:
        past = cache.get_seq_length()
        positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    if isinstance(mask, Tensor) and mask.ndim == 2:
        mask = F.pad(mask, (0, tail.length), value=1)
    return {
        "input_ids": repeat_at(ids, tail),
        "attention_mask": mask,
        "position_ids": repeat_at(positions, tail),
        "past_key_values": cache,
    }


def _keeps_order(model: Any, cache: Cache) -> bool:
    """Whether tokens that never enter the cache may stand behind the prompt: windows would count them."""
    return _computes_as_decode(model) and not any(cache.is_sliding)


def _computes_as_decode(model: Any) -> bool:
    """Whether the model's attention is what `decode` computes: sdpa without a soft cap."""
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    return model.config._attn_implementation.endswith("|sdpa") and not capped


_DIVIDED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values")
_HARMLESS = {"logits_to_keep", "use_cache", "return_dict"}


def _is_divisible(mask: Any, cache: Cache | None) -> bool:
    """Whether `_rows_of_mask` can divide it. A prepared mask of a sliding window counts keys from where the window of
    the whole prompt begins."""
    masks = list(mask.values()) if isinstance(mask, dict) else [mask]
    prepared = [m for m in masks if isinstance(m, BlockMask) or (m is not None and m.ndim == 4)]
    sliding = cache is not None and any(cache.is_sliding)
    return not any(isinstance(m, BlockMask) for m in masks) and not (sliding and prepared)


def _rows_of_mask(mask: Any, queries: slice, cut: bool) -> Any:
    """The mask for some of the query tokens. A 2-D mask (B, S) is one of keys; a 4-D one (B, 1, T, S) of both. `cut`
    takes the keys away that the cache has no place for yet: those of the tokens left out."""
    if isinstance(mask, dict):
        return {kind: _rows_of_mask(one, queries, cut) for kind, one in mask.items()}
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, queries] if queries.stop is not None else mask
    return mask[..., queries, queries] if cut else mask[..., queries, :]


def _write_first_stream(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    run = module.stream_state.run
    if run.streams == 1 and run.tail is None:
        return None

    def instead_of(cache: Cache) -> Any:
        return run.first_pass or FirstStreamCache(cache, run.streams, run.tail)

    return args, {k: instead_of(x) if isinstance(x, Cache) else x for k, x in kwargs.items()}


def _take_first_stream(module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    run = module.stream_state.run
    return (first_stream(args[0], run.n_local), *args[1:]) if run.streams > 1 else args


def _give_to_all(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    run = module.stream_state.run
    return duplicate(output, run.n_local) if run.streams > 1 else output
