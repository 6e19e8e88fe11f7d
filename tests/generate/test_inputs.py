"""Masks, positions and packing: whatever a caller hands over, the real tokens' logits are those of the plain call."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import CONTEXT, NEW, build, greedy, uncached, with_streams

pytestmark = pytest.mark.usefixtures("no_grad")
BACKENDS = ("sdpa", "eager")


@pytest.fixture
def no_grad() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    made = with_streams(build())
    made.set_attn_implementation(request.param)
    return made


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)


def left_padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    mask[2, :7] = 0
    return mask


def test_left_padded_rows_are_as_alone(model: Any, ids: Tensor) -> None:
    """Without position_ids too: they are counted from the mask, for the prefix has no position to move along."""
    mask = left_padded(ids)
    logits = model(ids * mask, attention_mask=mask).logits
    made = greedy(model, ids * mask, attention_mask=mask)
    for row, start in enumerate((4, 0, 7)):
        close(logits[row, start:], model(ids[row : row + 1, start:]).logits[0])
        assert torch.equal(made[row : row + 1, -NEW:], uncached(model, ids[row : row + 1, start:])[:, -NEW:])


def test_right_padded_rows_are_as_alone(model: Any, ids: Tensor) -> None:
    mask = left_padded(ids).flip(1)
    logits = model(ids * mask, attention_mask=mask).logits
    for row, end in enumerate((5, 9, 2)):
        close(logits[row, :end], model(ids[row : row + 1, :end]).logits[0])


def test_positions_of_one_row_serve_all(model: Any, ids: Tensor) -> None:
    positions = torch.arange(ids.shape[1])[None]
    close(model(ids, position_ids=positions).logits, model(ids).logits)
    close(model(ids, position_ids=positions.expand(3, -1)).logits, model(ids).logits)


def test_positions_that_start_elsewhere(model: Any, ids: Tensor) -> None:
    """The prefix has no position: moving the tokens changes what they see of it, the same way in every row."""
    moved = model(ids, position_ids=torch.arange(20, 20 + ids.shape[1])[None]).logits
    each = [model(row[None], position_ids=torch.arange(20, 20 + ids.shape[1])[None]).logits[0] for row in ids]
    close(moved, torch.stack(each))
    assert (moved - model(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("rows", [1, 3], ids=["one for all", "one a row"])
@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_a_causal_mask_of_four_dimensions(model: Any, ids: Tensor, kind: str, rows: int) -> None:
    seen = torch.ones(rows, 1, 9, 9, dtype=torch.bool).tril()
    if kind == "boolean" and model.config._attn_implementation.endswith("eager"):
        pytest.skip("transformers' eager attention adds its mask: it takes no boolean one")
    mask = seen if kind == "boolean" else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    close(model(ids, attention_mask=mask, position_ids=torch.arange(9)[None]).logits, model(ids).logits)


def test_a_mask_of_four_dimensions_that_differs_by_row(model: Any, ids: Tensor) -> None:
    """Row 0 hides its first four tokens, as padding would."""
    hidden = torch.zeros(3, 1, 9, 9)
    hidden.masked_fill_(~torch.ones(9, 9, dtype=torch.bool).tril(), torch.finfo(torch.float32).min)
    hidden[0, :, :, :4] = torch.finfo(torch.float32).min
    positions = torch.arange(9).repeat(3, 1)
    positions[0] = (positions[0] - 4).clamp(min=0)
    logits = model(ids, attention_mask=hidden, position_ids=positions).logits
    close(logits[0, 4:], model(ids[:1, 4:]).logits[0])
    close(logits[1:], model(ids[1:]).logits)


def test_packed_sequences_do_not_see_each_other(model: Any, ids: Tensor) -> None:
    """Positions that start anew begin another sequence; each has the prefix in front of it."""
    packed = torch.cat([ids[0, :4], ids[1, :9], ids[2, :2]])[None]
    positions = torch.cat([torch.arange(n) for n in (4, 9, 2)])[None]
    logits = model(packed, position_ids=positions, use_cache=False).logits[0]
    for row, part in enumerate(logits.split((4, 9, 2))):
        close(part, model(ids[row : row + 1, : len(part)]).logits[0])


def test_sequences_packed_by_a_mask(model: Any, ids: Tensor) -> None:
    packed = torch.cat([ids[0, :4], ids[1, :9], ids[2, :2]])[None]
    of = torch.tensor([0] * 4 + [1] * 9 + [2] * 2)
    seen = (of[:, None] == of) & torch.ones(15, 15, dtype=torch.bool).tril()
    mask = torch.zeros(1, 1, 15, 15).masked_fill(~seen, torch.finfo(torch.float32).min)
    positions = torch.cat([torch.arange(n) for n in (4, 9, 2)])[None]
    logits = model(packed, attention_mask=mask, position_ids=positions, use_cache=False).logits[0]
    for row, part in enumerate(logits.split((4, 9, 2))):
        close(part, model(ids[row : row + 1, : len(part)]).logits[0])


def test_attentions_show_the_prefix_first(ids: Tensor) -> None:
    model = with_streams(build())
    model.set_attn_implementation("eager")
    attentions = model(ids, output_attentions=True).attentions[0]
    assert attentions.shape == (4 * 3, 4, 9, 5 + 9)
    close(attentions.sum(-1), torch.ones(12, 4, 9))


def test_a_prompt_of_the_whole_context() -> None:
    model = with_streams(build())
    prompt = torch.randint(3, 97, (1, CONTEXT))
    assert torch.equal(greedy(model, prompt, max_new_tokens=1), uncached(model, prompt, new=1))


def test_a_sliding_window_counts_real_tokens_only(ids: Tensor) -> None:
    """A window of four, a prefix of five: every query sees the whole prefix and four tokens."""
    model = with_streams(build("mistral", sliding_window=4))
    prompt = ids.repeat(1, 3)
    assert torch.equal(greedy(model, prompt), uncached(model, prompt))
    mask = left_padded(ids)
    made = greedy(model, ids * mask, attention_mask=mask)[:, -NEW:]
    assert torch.equal(made[:1], uncached(model, ids[:1, 4:])[:, -NEW:])
