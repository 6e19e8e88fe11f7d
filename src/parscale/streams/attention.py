"""How a prefix enters attention: every query may attend to n learned keys and values in front of its own (section 3.1).

Registers, for each attention implementation of transformers that can carry a prefix, a twin `parscale|<name>` that puts
the module's `prefix_k`, `prefix_v` in front of the keys and values and delegates to the original. The prefix has no
position and never enters the KV cache: real tokens keep positions 0 … T−1, windows and crops count real tokens only.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from parscale.config import StreamsConfig
from parscale.streams import kv
from parscale.streams.decode import decode
from parscale.streams.order import Tail, divide_tail, duplicate, expand_bank, join_tail
from parscale.streams.state import Run

TAG = "parscale|"
SUPPORTED = ("eager", "sdpa", "flex_attention")
LONG = 384
"""Query tokens beyond which, on a CPU, n more in front cost less than the half of the scores that a mask discards."""
PAIRS = 2**14
"""Pairs of a query and a key, on a CPU, that cost what a call of attention does by itself."""
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k")
"""Where the requests of a packed batch begin and end, among its queries and among its keys."""
WITHOUT_STREAMS = Run(streams=1, smoothing=0.0)
"""How a module runs that nothing was added to."""
_SCORE_CHANGES = ("position_bias", "softcap", "s_aux")  # what `decode` does not compute


def _prefix(module: Any, streams: slice, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Some streams' prefix of one attention module, (p, H, n, Dk) and (p, H, n, Dv), or (1, …) if it is one for all;
    None if it has none."""
    if getattr(module, "prefix_k", None) is None:
        return None
    generator = module.stream_state.generator
    # Made in the layer itself: reentrant checkpointing frees whatever graph it reaches from within one.
    keys, values = generator(module.layer_idx) if generator else (module.prefix_k, module.prefix_v)
    if len(keys) > 1:
        keys, values = keys[streams], values[streams]
    return keys.to(like), values.to(like)


def attend(
    module: nn.Module,
    query: Float[Tensor, "pb h t d"],
    key: Float[Tensor, "kb hk s d"],
    value: Float[Tensor, "kb hk s e"],
    attention_mask: Any,
    *args: Any,
    implementation: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention over [prefix; keys]: equal to the inner implementation on the concatenation, under a mask that lets
    every query see the whole prefix. Returns what the inner one returns; attention weights have n more columns. Keys
    and values have P·B rows; or B, those of stream 0, when a cache has kept them alone.
    """
    state: Any = getattr(module, "stream_state", None)
    run = WITHOUT_STREAMS if state is None else state.run
    return _attend(module, run, query, key, value, attention_mask, *args, implementation=implementation, **kwargs)


def _attend(
    module: Any,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    implementation: str,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attend`, as a part of the pass `run`."""
    tail = run.tail
    shares = run.streams > 1 and module.stream_state.config.kv == "shared"
    sharing = run.n_local if shares else 0  # how many read stream 0's keys and values
    paged = kwargs.pop("cache", None)
    if sharing and key.shape[0] == query.shape[0]:  # no cache was there to drop the other streams' rows
        key, value = kv.of_first_stream(key, value, sharing)
    packed: dict[str, Any] = {}
    if paged is not None:  # updated here: the inner function would write the prefix into it with the rest
        key, value = kv.before_tail(key, value, tail)
        key, value = paged.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
        packed = {name: kwargs.pop(name) for name in _PACKED if name in kwargs}
    if tail is not None and packed:
        return _attend_packed_with_tail(module, run, query, key, value, attention_mask, packed, *args, **kwargs), None
    if tail is not None:
        return _attend_with_tail(module, run, query, key, value, attention_mask, *args, **kwargs), None
    if _is_better_by_request(query, key, packed):
        of_all = query, key, value, attention_mask, _requests(packed)
        return _attend_by_request(module, run, *of_all, *args, implementation=implementation, **kwargs), None
    prefix = _prefix(module, run.local_streams, key)
    length, scaling = query.shape[2], kwargs.get("scaling")
    plain_scores = all(kwargs.get(name) is None for name in _SCORE_CHANGES)
    mask_by_head = isinstance(attention_mask, Tensor) and attention_mask.ndim == 4 and attention_mask.shape[1] > 1
    decoding = implementation == "sdpa" and length == 1 and plain_scores and not torch.is_grad_enabled()
    decoding = decoding and not mask_by_head
    if decoding and sharing:
        return decode(query, key, value, prefix, attention_mask, scaling, sharing), None
    if decoding and prefix is not None:
        return decode(query, key, value, prefix, attention_mask, scaling, len(prefix[0])), None
    if sharing:
        key, value = duplicate(key, sharing), duplicate(value, sharing)
    return _concatenated(module, query, key, value, attention_mask, prefix, implementation, *args, **kwargs)


def _concatenated(
    module: Any,
    query: Float[Tensor, "pb h t d"],
    key: Float[Tensor, "pb hk s d"],
    value: Float[Tensor, "pb hk s e"],
    attention_mask: Any,
    prefix: tuple[Tensor, Tensor] | None,
    implementation: str,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the inner implementation gives for the concatenation of prefix and keys."""
    inner = inner_attention(module, implementation)
    if prefix is None:
        return inner(module, query, key, value, attention_mask, *args, **kwargs)
    prefix_k, prefix_v = prefix
    length, n, rows = query.shape[2], prefix_k.shape[2], key.shape[0]
    causal = implementation == "sdpa" and attention_mask is None and length > 1
    if causal:
        key, value = key[:, :, :length], value[:, :, :length]  # a static cache is longer; nothing is behind T yet
    key = torch.cat([expand_bank(prefix_k, rows), key], dim=2)  # (P·B, Hk, n+S, D)
    value = torch.cat([expand_bank(prefix_v, rows), value], dim=2)
    if causal and length > LONG and not query.is_cuda:
        padded = F.pad(query, (0, 0, n, 0))  # n queries that nobody reads make a square: (P·B, H, n+T, D)
        out, weights = inner(module, padded, key, value, None, *args, **kwargs)
        return out[:, n:], weights
    if causal:
        attention_mask = _causal(query, n)
    if type(attention_mask) is Tensor:  # a BlockMask or causal_lower_right covers the prefix already
        attention_mask = _mask_with_prefix(attention_mask, n)
    return inner(module, query, key, value, attention_mask, *args, **kwargs)


def _is_better_by_request(query: Tensor, key: Tensor, packed: dict[str, Any]) -> bool:
    """Whether a packed batch has so many pairs of queries and keys of different requests, for the mask to discard, that
    they cost more than calls do. On a GPU they do not."""
    requests = len(packed.get("cu_seq_lens_q", ())) - 1
    return query.device.type == "cpu" and requests > 1 and query.shape[2] * key.shape[2] > PAIRS * requests


def _requests(packed: dict[str, Any]) -> list[tuple[slice, slice]]:
    """Of every request in a packed batch: its queries, and its keys."""
    of_queries, of_keys = (pairwise(packed[name].tolist()) for name in _PACKED)
    return [(slice(*q), slice(*k)) for q, k in zip(of_queries, of_keys, strict=True)]


def _attend_by_request(
    module: Any,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    requests: list[tuple[slice, slice]],
    *args: Any,
    **kwargs: Any,
) -> Float[Tensor, "pb t h e"]:
    """The requests of a packed batch one by one."""
    attended = []
    for q, k in requests:
        own = query[:, :, q], key[:, :, k], value[:, :, k], mask[..., q, k]
        attended.append(_attend(module, run, *own, *args, **kwargs)[0])
    return torch.cat(attended, dim=1)


def _attend_with_tail(
    module: Any, run: Run, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *args: Any, **kwargs: Any
) -> Float[Tensor, "b n h e"]:
    """Stream 0's prompt as always, and the last token of the other streams behind it: each sees what the prompt's last
    token sees, and a prefix of its own. Keys and values are the prompt's alone."""
    tail: Any = run.tail
    prompt, others = divide_tail(query.transpose(1, 2), tail)  # (B, T, H, D), (k·B, 1, H, D)
    length = prompt.shape[1]
    seen = key.shape[2] if mask is not None else length  # without a mask a static cache is longer than what it holds
    mask = None if mask is None else mask[..., :length, :seen]
    of_prompt = prompt.transpose(1, 2), key, value, mask
    out, _ = _attend(module, replace(run, tail=None), *of_prompt, *args, implementation="sdpa", **kwargs)
    of_last = None if mask is None else mask[..., -1:, :]
    keys = key[:, :, :seen], value[:, :, :seen], _prefix_of_others(module, tail, key)
    behind = decode(others.transpose(1, 2), *keys, of_last, kwargs.get("scaling"), tail.streams)
    return join_tail(out, behind)


def _attend_packed_with_tail(
    module: Any,
    run: Run,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    packed: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Float[Tensor, "b n h e"]:
    """The same for a packed batch: each token behind it sees what the one at its place sees, in its own request."""
    tail: Any = run.tail
    alone = replace(run, tail=None)
    prompt, others = divide_tail(query.transpose(1, 2), tail)  # (1, T, H, D), (k, r, H, D)
    of_prompt, prefix = (prompt.transpose(1, 2), key, value, mask), _prefix_of_others(module, tail, key)
    if not _is_better_by_request(of_prompt[0], key, packed):
        out, _ = _attend(module, alone, *of_prompt, *args, implementation="sdpa", **kwargs)
        keys = (
            duplicate(key, tail.streams),
            duplicate(value, tail.streams),
            mask[..., tail.places.to(mask.device), :],
            prefix,
        )
        behind, _ = _concatenated(module, others.transpose(1, 2), *keys, "sdpa", *args, **kwargs)
        return join_tail(out, behind)
    requests, each = _requests(packed), []
    out = _attend_by_request(module, alone, *of_prompt, requests, *args, implementation="sdpa", **kwargs)
    for i, place in enumerate(tail.places.tolist()):
        k = next(k for q, k in requests if place < q.stop)
        keys = key[:, :, k], value[:, :, k], prefix, mask[..., place : place + 1, k]
        each.append(decode(others[:, i : i + 1].transpose(1, 2), *keys, kwargs.get("scaling"), tail.streams))
    return join_tail(out, torch.cat(each, dim=1))


def _prefix_of_others(module: Any, tail: Tail, key: Tensor) -> tuple[Tensor, Tensor] | None:
    return _prefix(module, slice(1, 1 + tail.streams), key)


def flex_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any],
    attention_mask: Tensor | None = None,
    config: Any = None,
    device: torch.device | str = "cpu",
    **_: Any,
) -> BlockMask:
    """transformers' BlockMask over n + S columns: the first n (the prefix) are seen by all, the rest as without it."""
    settings = StreamsConfig.from_json(vars(config))
    n = settings.prefix_tokens if settings.has_prefix else 0
    if attention_mask is not None:
        padding = F.pad(attention_mask, (0, max(0, kv_offset + kv_length - attention_mask.shape[-1])))

    @no_type_check  # torch counts the arguments of the function itself: it must stay unwrapped
    def visible(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        column = (kv - n).clamp(min=0) + kv_offset
        seen = mask_function(b, h, q + q_offset, column)
        if attention_mask is not None:
            seen = seen & padding[b, column]
        return (kv < n) | seen

    build = torch.compile(create_block_mask)  # uncompiled, it would hold the whole mask in memory
    return build(visible, batch_size, None, q_length, kv_length + n, device=device)


def register() -> None:
    """Make the tagged implementations known to transformers. The masks of eager and sdpa are the inner ones: their
    columns for the prefix are added at the attention itself, where a caller's own 4-D mask arrives as well."""
    for name in SUPPORTED:
        AttentionInterface.register(TAG + name, partial(attend, implementation=name))
        mask = flex_mask if name == "flex_attention" else ALL_MASK_ATTENTION_FUNCTIONS[name]
        AttentionMaskInterface.register(TAG + name, mask)


def inner_attention(module: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation != "eager":
        return ALL_ATTENTION_FUNCTIONS[implementation]
    # Each modeling file has an eager function of its own (sinks, soft caps); it is found beside the module's class.
    return sys.modules[type(module).__module__].eager_attention_forward


def _causal(query: Tensor, n: int) -> Any:
    """The mask that transformers means by None. It must never reach sdpa as None: with kv > q, sdpa's wrapper would cut
    the keys to `key[:, :, :T]`, and the last n real tokens would vanish silently.
    """
    length = query.shape[2]
    if query.is_cuda and not torch.compiler.is_compiling():
        return causal_lower_right(length, length + n)
    return torch.ones(length, length, dtype=torch.bool, device=query.device).tril()[None, None]


def _mask_with_prefix(mask: Tensor, n: int) -> Tensor:
    """(…, T, S) → (…, T, n+S): the prefix is visible to every query. Boolean masks and additive ones."""
    return F.pad(mask, (n, 0), value=True if mask.dtype == torch.bool else 0.0)


register()
