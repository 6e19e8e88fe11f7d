"""Attention of one query token of every stream: the KV cache is read once and never copied, whoever owns it.

The scores of prefix and cache are concatenated, not their keys; where torch's fused kernel is the better one, what it
gives for the cache is weighed against the prefix by the logs of their sums.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from parscale.streams.order import split


def decode(
    query: Float[Tensor, "pb h 1 d"],
    key: Float[Tensor, "kb hk s d"],
    value: Float[Tensor, "kb hk s e"],
    prefix: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
    scaling: float | None,
    streams: int,
) -> Float[Tensor, "pb 1 h e"]:
    """softmax([q_p·prefix_k_p, q_p·k_p])·[prefix_v_p; v_p] for one query token of every stream p.

    Keys and values have P·B rows, each stream its own; or B, which all read: they are then P·G query heads to every
    key/value head. The prefix is (P, Hk, n, D) and (P, Hk, n, E); (1, Hk, n, …) if it is one for all streams; or None.
    Of a mask with a row for every stream the first stream's are taken where the keys are: all are alike.
    """
    batch, kv_heads = query.shape[0] // streams, key.shape[1]
    grouped = query.squeeze(2).unflatten(1, (kv_heads, -1))  # (P·B, Hk, G, D): G query heads share a K/V head
    grouped = grouped * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    by_stream = split(grouped, streams)  # (P, B, Hk, G, D)
    shared = key.shape[0] == batch

    def meet_keys(x: Float[Tensor, "p b hk g c"]) -> Float[Tensor, "kb hk r c"]:
        return x.permute(1, 2, 0, 3, 4).flatten(2, 3) if shared else x.flatten(0, 1)

    def of_streams(x: Tensor) -> Float[Tensor, "p b hk g *c"]:
        return x.unflatten(2, (streams, -1)).movedim(2, 0) if shared else split(x, streams)

    queries = meet_keys(by_stream)  # (B, Hk, P·G, D) or (P·B, Hk, G, D)
    mask = None if mask is None else mask[: key.shape[0]]
    if _has_fused(queries, value):
        out, total = (of_streams(x) for x in _fused(queries, key, value, mask))
        if prefix is not None:
            out = _add_prefix(out, total, by_stream, *prefix)
        return out.flatten(0, 1).flatten(1, 2)[:, None]  # (P·B, 1, H, E)
    scores = queries @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + _additive(mask, scores.dtype)  # the scores of all queries are passed over once
    n = 0
    if prefix is not None:
        n = prefix[0].shape[2]
        on_prefix = by_stream @ prefix[0][:, None].transpose(-1, -2)  # (P, B, Hk, G, n)
        scores = torch.cat([meet_keys(on_prefix), scores], dim=-1)
    weights = scores.softmax(-1).to(value.dtype)  # in float32 inside, whatever the scores' dtype is
    out = of_streams(weights[..., n:] @ value)  # (P, B, Hk, G, E)
    if prefix is not None:
        out = out + of_streams(weights[..., :n]) @ prefix[1][:, None]
    return out.flatten(0, 1).flatten(1, 2)[:, None]  # (P·B, 1, H, E)


def _has_fused(query: Tensor, value: Tensor) -> bool:
    """Whether torch's fused kernel is the better one for a few rows of queries: in two bytes a number, on a CPU, where
    products of matrices may have no instructions for it, and the scores of a long cache are passed over many times."""
    half = query.dtype in (torch.bfloat16, torch.float16)
    return query.device.type == "cpu" and half and query.shape[-1] == value.shape[-1]


def _fused(
    query: Float[Tensor, "kb hk r d"], key: Float[Tensor, "kb hk s d"], value: Float[Tensor, "kb hk s d"], mask: Any
) -> tuple[Float[Tensor, "kb hk r d"], Float[Tensor, "kb hk r"]]:
    """softmax(q·k)·v, and log Σ exp(q·k) of every query, which what stands in front of the keys is weighed against."""
    if mask is not None:  # of a row of −∞ alone, as padding is, the kernel gives no sum
        mask = _additive(mask, query.dtype).clamp(min=torch.finfo(query.dtype).min)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(query, key, value, 0.0, False, attn_mask=mask, scale=1.0)


def _add_prefix(
    out: Float[Tensor, "p b hk g e"],
    total: Float[Tensor, "p b hk g"],
    query: Float[Tensor, "p b hk g d"],
    prefix_k: Float[Tensor, "q hk n d"],
    prefix_v: Float[Tensor, "q hk n e"],
) -> Float[Tensor, "p b hk g e"]:
    """Attention over [prefix; keys] from that over the keys, `out` with the `total` log Σ exp of its scores."""
    scores = (query @ prefix_k[:, None].transpose(-1, -2)).float()
    share = torch.sigmoid(scores.logsumexp(-1) - total)[..., None]
    on_prefix = scores.softmax(-1).to(prefix_v.dtype) @ prefix_v[:, None]
    return torch.lerp(out.float(), on_prefix.float(), share).to(out.dtype)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """−∞ where a boolean mask is False; an additive one as it is."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)
