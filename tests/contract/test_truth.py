"""Every family equals P separate passes with the prefix concatenated by hand, in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.contract.conftest import B, Case, N, P, T
from tests.contract.families import VOCABULARY
from tests.contract.reference import truth


@torch.no_grad()
def test_equals_separate_passes(case: Case, ids: Tensor) -> None:
    expected = truth(case.plain, case.model, ids)
    assert expected.weights.std() > 0.1  # else the head would not be tested
    expected.close(case.model(ids).logits)


@torch.no_grad()
def test_batch_as_large_as_other_dimensions(case: Case) -> None:
    """A batch of three with its own position_ids looks like multimodal positions (3, B, T)."""
    ids = torch.randint(3, VOCABULARY, (3, T))
    positions = torch.arange(T).expand(3, T)
    truth(case.plain, case.model, ids).close(case.model(ids, position_ids=positions).logits)


@torch.no_grad()
def test_one_stream_without_prefix_is_the_plain_model(case: Case, ids: Tensor) -> None:
    model = case.build(streams=1, prefix_tokens=0)
    assert list(model.state_dict()) == list(case.plain.state_dict())
    assert torch.equal(model(ids).logits, case.plain(ids).logits)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    masked = [m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, case.plain)]
    assert torch.equal(*masked)


@torch.no_grad()
def test_control_is_one_pass_with_its_prefix(case: Case, ids: Tensor) -> None:
    model = case.build(streams=1)
    assert model.base_model.aggregate_layer is None
    truth(case.plain, model, ids).close(model(ids).logits)


@torch.no_grad()
def test_a_token_moves_nothing_before_it(case: Case, ids: Tensor) -> None:
    expected = truth(case.plain, case.model, ids)
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % VOCABULARY
    logits = case.model(changed).logits
    expected.close(logits[:, :5], (slice(None), slice(5)))
    assert (logits[:, 5:] - expected.logits[:, 5:]).abs().amax(-1).min() > 100 * expected.tolerance


@torch.no_grad()
@pytest.mark.parametrize("positions", [False, True], ids=["no-position-ids", "position-ids"])
def test_left_padding_changes_nothing(case: Case, ids: Tensor, positions: bool) -> None:
    pads = (0, 4)
    padded, mask = torch.zeros(B, T + max(pads), dtype=torch.long), torch.zeros(B, T + max(pads), dtype=torch.long)
    lengths = [T + max(pads) - pad for pad in pads]
    rows = [torch.cat([ids[b], ids[b]])[:length] for b, length in enumerate(lengths)]
    for b, pad in enumerate(pads):
        padded[b, pad:], mask[b, pad:] = rows[b], 1
    inputs: dict[str, Any] = {"attention_mask": mask}
    if positions:
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = case.model(padded, **inputs).logits
    for b, pad in enumerate(pads):
        truth(case.plain, case.model, rows[b][None]).close(logits[b : b + 1, pad:])


@torch.no_grad()
@pytest.mark.parametrize("p", range(1, P + 1))
def test_fewer_streams(case: Case, ids: Tensor, p: int) -> None:
    model = case.build()
    model.set_streams(p)
    truth(case.plain, model, ids, streams=p).close(model(ids).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [
        {"diversify": ("embedding",)},
        {"diversify": ("prefix", "embedding")},
        {"aggregate": "mean"},
        {"smoothing": 0.0},
        {"streams": 2, "prefix_tokens": 1, "smoothing": 0.5},
    ],
    ids=["embedding", "both", "mean", "sharp", "small"],
)
def test_other_settings(case: Case, ids: Tensor, settings: dict[str, Any]) -> None:
    model = case.build(**settings)
    truth(case.plain, model, ids).close(model(ids).logits)
    model.set_streams(2)
    truth(case.plain, model, ids, streams=2).close(model(ids).logits)


@torch.no_grad()
def test_embeddings_instead_of_ids(case: Case, ids: Tensor) -> None:
    for settings in ({}, {"diversify": ("prefix", "embedding")}):
        model = case.build(**settings)
        embeds = model.get_input_embeddings()(ids)
        truth(case.plain, model, ids).close(model(inputs_embeds=embeds).logits)


@torch.no_grad()
def test_positions_of_one_row(case: Case, ids: Tensor) -> None:
    truth(case.plain, case.model, ids).close(case.model(ids, position_ids=torch.arange(T)[None]).logits)


@torch.no_grad()
def test_own_four_dimensional_mask(trained_case: Case, ids: Tensor) -> None:
    """The caller's mask has columns for real tokens only; the prefix stays visible. One for all rows, or one a row."""
    case = trained_case
    if case.family.recurrent or case.family.settings.get("sliding_window"):
        pytest.skip("the family wants masks of several kinds")
    expected = truth(case.plain, case.model, ids)
    allowed = torch.ones(T, T, dtype=torch.bool).tril()[None, None]
    masks = [torch.where(allowed, 0.0, torch.finfo(torch.float32).min)]
    if case.backend == "sdpa":
        masks.append(allowed)
    for mask in masks:
        expected.close(case.model(ids, attention_mask=mask).logits)
        expected.close(case.model(ids, attention_mask=mask.expand(B, 1, T, T)).logits)


@torch.no_grad()
def test_hidden_states_of_every_stream(case: Case, ids: Tensor) -> None:
    expected = truth(case.plain, case.model, ids)
    output = case.model(ids, output_hidden_states=True)
    plain = case.plain(ids, output_hidden_states=True)
    expected.close(output.logits)
    assert len(output.hidden_states) == len(plain.hidden_states)
    assert all(h.shape == (P * B, T, 32) for h in output.hidden_states)
    last = output.hidden_states[-1].unflatten(0, (P, B)).double()
    torch.testing.assert_close(last, expected.streams, rtol=0, atol=10 * expected.tolerance)


@torch.no_grad()
def test_attentions_show_the_prefix(case: Case, ids: Tensor) -> None:
    if case.backend != "eager":
        pytest.skip(f"{case.backend} returns no attention weights")
    output = case.model(ids, output_attentions=True)
    plain = case.plain(ids, output_attentions=True)
    assert len(output.attentions) == len(plain.attentions)
    assert all(a.shape == (P * B, 4, T, N + T) for a in output.attentions)
    sums = torch.stack(output.attentions).sum(-1)
    assert (sums <= 1 + 1e-5).all()  # a sink takes the rest
    if case.family.name != "gpt_oss":
        torch.testing.assert_close(sums, torch.ones_like(sums))
    assert all((a[..., :N].sum(-1) > 0).all() for a in output.attentions)  # whatever the window
