"""The row order: stream-major, and every input is told apart by its number of dimensions."""

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from parscale.streams.order import (
    duplicate,
    duplicate_mask,
    duplicate_positions,
    expand_bank,
    fold_into_heads,
    reorder,
    split,
    unfold_from_heads,
)

P = 3


def test_duplicate_holds_one_stream_after_another() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert duplicate(ids, P).tolist() == [[1, 2], [3, 4]] * P
    assert torch.equal(split(duplicate(ids, P).float(), P), ids.float().expand(P, 2, 2))


def test_bank_goes_to_its_streams_rows() -> None:
    bank = torch.arange(P).view(P, 1, 1, 1).float()
    assert expand_bank(bank, 6).flatten().tolist() == [0, 0, 1, 1, 2, 2]


def test_reorder_stays_within_each_stream() -> None:
    """A beam index of the batch, used on P·B rows as it is, would give all streams the cache of stream 0."""
    batch = torch.tensor([[10], [20]])
    beams = torch.tensor([1, 1])
    rows = duplicate(batch, P) + torch.arange(P).repeat_interleave(2)[:, None]  # 10, 20, 11, 21, 12, 22
    assert rows[reorder(beams, P, 2)].flatten().tolist() == [20, 20, 21, 21, 22, 22]
    assert rows[reorder(beams[:1], P, 2)].flatten().tolist() == [20, 21, 22]


@pytest.mark.parametrize("batch", [1, 2, 3, 4])
def test_positions(batch: int) -> None:
    """A batch of three looks like multimodal positions (3, B, T), if only shape[0] is looked at."""
    rows = torch.arange(batch)[:, None] * 100 + torch.arange(5)
    expected = rows if batch == 1 else torch.cat([rows] * P)
    assert torch.equal(duplicate_positions(rows, P), expected)
    multimodal = torch.stack([rows, rows + 1000, rows + 2000])  # (3, B, T)
    doubled = duplicate_positions(multimodal, P)
    assert doubled.shape == (3, P * batch, 5)
    assert torch.equal(doubled[1], torch.cat([rows + 1000] * P))


def test_masks() -> None:
    padding = torch.tensor([[0, 1], [1, 1]])
    assert torch.equal(duplicate_mask(padding, P), torch.cat([padding] * P))
    one_for_all = torch.zeros(1, 1, 2, 2)
    assert duplicate_mask(one_for_all, P) is one_for_all
    by_row = torch.randn(2, 1, 2, 2)
    assert torch.equal(duplicate_mask(by_row, P), torch.cat([by_row] * P))
    by_layer = duplicate_mask({"full_attention": padding, "sliding_attention": None}, P)
    assert torch.equal(by_layer["full_attention"], torch.cat([padding] * P))
    assert by_layer["sliding_attention"] is None
    assert duplicate_mask(None, P) is None


def test_block_mask_of_a_batch() -> None:
    lengths = torch.tensor([100, 300])
    mask = create_block_mask(lambda b, h, q, kv: (kv <= q) & (kv < lengths[b]), 2, None, 384, 384, device="cpu")
    many = duplicate_mask(mask, P)
    assert many.shape[0] == 2 * P
    assert torch.equal(many.to_dense(), torch.cat([mask.to_dense()] * P))
    for row in range(2 * P):
        seen = many.mask_mod(torch.tensor(row), torch.tensor(0), torch.tensor(350), torch.arange(384))
        assert seen.sum() == lengths[row % 2]


def test_fold_into_heads_and_back() -> None:
    x = torch.randn(P * 2, 4, 5, 6)
    folded = fold_into_heads(x, P)
    assert folded.shape == (2, P * 4, 5, 6)
    assert torch.equal(folded[1, 4:8], x[2 + 1])  # stream 1 of batch row 1
    assert torch.equal(unfold_from_heads(folded, P), x)
