"""The input duplicator: one batch becomes P, in stream-major row order. No other file knows that order.

A tensor with P·B rows holds stream 0's batch first, then stream 1's, and so on: row = p·B + b (paper, section 2.2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, no_type_check

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask


def duplicate(x: Tensor, streams: int, batch_dim: int = 0) -> Tensor:
    """Repeat a batch for every stream: (…, B, …) → (…, P·B, …) along `batch_dim`."""
    repeats = [1] * x.ndim
    repeats[batch_dim] = streams
    return x.repeat(repeats)


def expand_bank(bank: Float[Tensor, "p h n d"], rows: int) -> Float[Tensor, "pb h n d"]:
    """Give every row its stream's entry of a per-stream bank: (P, H, n, D) → (P·B, H, n, D), where P·B = `rows`."""
    streams = bank.shape[0]
    return bank[:, None].expand(streams, rows // streams, *bank.shape[1:]).flatten(0, 1)


def split(x: Float[Tensor, "pb ..."], streams: int) -> Float[Tensor, "p b ..."]:
    """Undo `duplicate`'s order: (P·B, …) → (P, B, …)."""
    return x.unflatten(0, (streams, -1))


def first_stream(x: Float[Tensor, "pb ..."], streams: int) -> Float[Tensor, "b ..."]:
    """The rows of stream 0: (P·B, …) → (B, …)."""
    return x[: x.shape[0] // streams]


@dataclass(frozen=True)
class Tail:
    """What stands behind a prompt of stream 0 in the same pass: the tokens from which something is predicted, once more
    for each other stream.

    Args:
        streams: k, how many others there are.
        batch: B, for modules that flatten (B, T) into one dimension.
        places: where in the prompt those tokens are, (r,); the same in every row.
    """

    streams: int
    batch: int
    places: Int[Tensor, " r"]

    @property
    def length(self) -> int:
        """How many tokens stand behind the prompt, k·r."""
        return self.streams * len(self.places)


def repeat_at(x: Int[Tensor, "... t"], tail: Tail) -> Int[Tensor, "... n"]:
    """Ids or positions of a prompt (…, T), and behind it those of the tail, (…, T + k·r)."""
    return torch.cat([x, *[x[..., tail.places]] * tail.streams], dim=-1)


def divide_tail(x: Float[Tensor, "b n ..."], tail: Tail) -> tuple[Tensor, Tensor]:
    """(B, T + k·r, …) in its two parts: the prompt (B, T, …), and the tokens of the other streams (k·B, r, …)."""
    length = x.shape[1] - tail.length
    prompt, last = x[:, :length], x[:, length:]
    return prompt, last.unflatten(1, (tail.streams, len(tail.places))).transpose(0, 1).flatten(0, 1)


def join_tail(prompt: Float[Tensor, "b t ..."], last: Float[Tensor, "kb r ..."]) -> Float[Tensor, "b n ..."]:
    """Undo `divide_tail`."""
    behind = last.unflatten(0, (-1, prompt.shape[0])).transpose(0, 1)  # (B, k, r, …)
    return torch.cat([prompt, behind.flatten(1, 2)], dim=1)


def reorder(index: Int[Tensor, " c"], streams: int, batch: int) -> Int[Tensor, " pc"]:
    """Row indices for a cache of P·B rows, from indices into the batch of B (beam search): (C,) → (P·C,)."""
    offsets = torch.arange(streams, device=index.device) * batch
    return (offsets[:, None] + index[None, :]).flatten()


def fold_into_heads(x: Float[Tensor, "pb h t d"], streams: int) -> Float[Tensor, "b ph t d"]:
    """One row per batch entry with the heads of all its streams, stream 0's first: (P·B, H, T, D) → (B, P·H, T, D)."""
    return split(x, streams).transpose(0, 1).flatten(1, 2)


def unfold_from_heads(x: Float[Tensor, "b ph t d"], streams: int) -> Float[Tensor, "pb h t d"]:
    """Undo `fold_into_heads`: (B, P·H, T, D) → (P·B, H, T, D)."""
    return x.unflatten(1, (streams, -1)).transpose(0, 1).flatten(0, 1)


def duplicate_positions(position_ids: Tensor, streams: int) -> Tensor:
    """(1, T) stays, for it is the same for every row; (B, T) → (P·B, T); multimodal (3, B, T) → (3, P·B, T)."""
    if position_ids.shape[0] == 1 and position_ids.ndim == 2:
        return position_ids
    # Told apart by the number of dimensions, never by shape[0] == B: a batch of three looks like (3, B, T).
    return duplicate(position_ids, streams, batch_dim=position_ids.ndim - 2)


def duplicate_mask(mask: Any, streams: int) -> Any:
    """A 2-D padding mask (B, S), a 4-D mask (B or 1, …), a flex BlockMask, or a dict of them by layer type."""
    if isinstance(mask, Mapping):
        return {name: duplicate_mask(one, streams) for name, one in mask.items()}
    if isinstance(mask, BlockMask):
        return _duplicate_block_mask(mask, streams)
    if not isinstance(mask, Tensor) or (mask.ndim == 4 and mask.shape[0] == 1):
        return mask
    return duplicate(mask, streams)


def _duplicate_block_mask(mask: BlockMask, streams: int) -> BlockMask:
    batch = mask.kv_num_blocks.shape[0]
    if batch == 1:
        return mask

    @no_type_check  # torch counts the arguments of the function itself: it must stay unwrapped
    def of_the_batch(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return mask.mask_mod(b % batch, h, q, kv)

    def rows(x: Tensor | None) -> Tensor | None:
        return None if x is None else duplicate(x, streams)

    return BlockMask.from_kv_blocks(
        duplicate(mask.kv_num_blocks, streams),
        duplicate(mask.kv_indices, streams),
        rows(mask.full_kv_num_blocks),
        rows(mask.full_kv_indices),
        BLOCK_SIZE=mask.BLOCK_SIZE,
        mask_mod=of_the_batch,
        seq_lengths=mask.seq_lengths,
    )
