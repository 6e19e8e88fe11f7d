"""A p for every token: what each token gets is what it gets when all tokens run that p."""

from typing import Any

import pytest
import torch
from torch import Tensor

from parscale import HardTokens, InputError
from parscale.streams.adaptive import adaptive_losses, prediction_entropy
from tests.small import NEW, VOCABULARY, build, with_streams


@pytest.fixture
def model() -> Any:
    return with_streams(build(), kv="shared", diversify=("prefix", "lora"))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(3))


def between(entropies: Tensor) -> float:
    """A threshold in the middle, next to no entropy: none may fall to the other side by rounding."""
    ordered = entropies.flatten().sort().values
    return ordered[len(ordered) // 2 - 1 :][:2].mean().item()


@torch.no_grad()
def by_hand(model: Any, ids: Tensor, hard: HardTokens) -> tuple[Tensor, list[bool]]:
    """Greedy, the whole sequence anew for each token and row at the p that the token deserves."""
    rows, chosen = [], []
    for row in ids:
        row = row[None]
        for _ in range(NEW):
            model.set_streams(1)
            logits = model(row).logits[:, -1]
            chosen.append(prediction_entropy(logits).item() > hard.entropy)
            if chosen[-1]:
                model.set_streams(hard.streams)
                logits = model(row).logits[:, -1]
            row = torch.cat([row, logits.argmax(-1, keepdim=True)], dim=1)
        rows.append(row)
    return torch.cat(rows), chosen


@pytest.mark.parametrize(
    "settings",
    [
        {"diversify": ("prefix", "lora")},
        {"diversify": ("prefix", "lora"), "shared_prefix": True},
        {"diversify": ("prefix", "lora"), "plain_first": True},
        {"diversify": ("prefix", "rank1", "embedding")},
        {"diversify": ("lora",), "prefix_tokens": 0},
    ],
    ids=str,
)
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_generates_each_token_at_its_own_p(settings: dict[str, Any], family: str, ids: Tensor) -> None:
    model: Any = with_streams(build(family), kv="shared", **settings)
    model.set_streams(1)
    with torch.no_grad():
        middle = between(prediction_entropy(model(ids).logits))
    hard = HardTokens(entropy=middle, streams=3)
    expected, chosen = by_hand(model, ids, hard)
    assert any(chosen)
    assert not all(chosen)
    model.set_streams(4)
    options: Any = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids, streams=hard, **options), expected)
    assert model.streams == 4
    assert model.base_model.stream_state.run.adaptive is None
    model.set_streams(hard)
    assert torch.equal(model.generate(ids, **options), expected)


def test_a_hard_token_runs_the_other_streams_alone(model: Any, ids: Tensor) -> None:
    """The first stream has run, and what it wrote is in the cache."""
    rows: list[int] = []
    model.base_model.layers[0].mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    model.generate(ids, streams=HardTokens(0.0, 4), max_new_tokens=3, min_new_tokens=3)
    batch = len(ids)
    assert rows == [batch] + 3 * [batch, 3 * batch]  # the prompt but for its last token; then both passes for each


def test_only_rows_with_a_hard_token_run_again(model: Any, ids: Tensor) -> None:
    """Left padding and all: their part of the inputs and of the cache is theirs."""
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        by_p = {p: model.with_streams(p)(**inputs).logits[:, -1:] for p in (1, 4)}
        entropies = prediction_entropy(by_p[1])[:, 0]
        rows: list[int] = []
        model.base_model.layers[0].mlp.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
        hard = entropies.argmax().item()
        model.set_streams(HardTokens(entropies.mean().item(), 4))
        output = model(**inputs, logits_to_keep=1, use_cache=True)
    expected = torch.stack([by_p[4 if i == hard else 1][i] for i in range(2)])
    torch.testing.assert_close(output.logits, expected)
    assert output.past_key_values.get_seq_length() == ids.shape[1]
    assert rows == [2, 2, 3]


def test_several_tokens_at_once_each_have_their_own_p(model: Any, ids: Tensor) -> None:
    """As in prompt lookup and assisted decoding, whose drafts are checked together."""
    with torch.no_grad():
        by_p = {p: model.with_streams(p)(ids).logits for p in (1, 3)}
        hard = HardTokens(entropy=between(prediction_entropy(by_p[1])), streams=3)
        model.set_streams(hard)
        expected = torch.where((prediction_entropy(by_p[1]) > hard.entropy)[..., None], by_p[3], by_p[1])
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
        torch.testing.assert_close(model(ids).logits, expected)
        for refused in ({"labels": ids}, {"return_dict": False}):
            with pytest.raises(InputError, match="hard tokens have no loss, and no tuple"):
                model(ids, **refused)


def test_gradients_are_refused_until_p_is_a_number(model: Any, ids: Tensor) -> None:
    """Stream 0 alone, without a word, is not what was asked for."""
    model.set_streams(HardTokens(0.0, 3))
    for options in ({}, {"labels": ids}):
        with pytest.raises(InputError, match=r"hard tokens are for inference.*no_grad\(\).*set_streams\(p\)"):
            model(ids, **options)
    model.set_streams(3)
    model(ids, labels=ids).loss.backward()


def test_losses_between_one_stream_and_all(model: Any, ids: Tensor) -> None:
    rows = adaptive_losses(model, ids, shares=(0.0, 0.5, 1.0))
    losses = {}
    for p in (1, 4):
        model.set_streams(p)
        losses[p] = model(ids, labels=ids).loss.item()
    assert [row.share for row in rows] == [0.0, 0.5, 1.0]
    assert rows[0].loss == pytest.approx(losses[1])
    assert rows[2].loss == pytest.approx(losses[4])
    assert rows[0].entropy > rows[1].entropy > rows[2].entropy


def test_refusals(model: Any) -> None:
    with pytest.raises(InputError, match=r"entropy=-1\.0"):
        HardTokens(-1.0, 2)
    with pytest.raises(InputError, match="streams=1"):
        HardTokens(1.0, 1)
    with pytest.raises(InputError, match="this model has 4"):
        model.set_streams(HardTokens(1.0, 5))
    with pytest.raises(InputError, match="kv='shared'"):
        with_streams(build()).set_streams(HardTokens(1.0, 2))
    ids = torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(InputError, match="can be cropped"):
        model.generate(ids, streams=HardTokens(0.0, 2), cache_implementation="static", max_new_tokens=2)
