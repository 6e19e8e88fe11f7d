"""Dynamic P: fewer streams from the same weights, between calls, for one call, and side by side in one process."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import StoppingCriteria

from parscale import HardTokens, InputError
from tests.small import CONTEXT, build, greedy, uncached, with_streams


@pytest.fixture
def model() -> Any:
    return with_streams(build())


@torch.no_grad()
@pytest.mark.parametrize("streams", [1, 2, 3, 4])
def test_p_for_one_call(model: Any, ids: Tensor, streams: int) -> None:
    narrow = with_streams(build())
    narrow.set_streams(streams)
    assert torch.equal(greedy(model, ids, streams=streams), uncached(narrow, ids))
    assert model.streams == 4
    assert torch.equal(greedy(model, ids), uncached(model, ids))


def test_fewer_streams_are_another_model(model: Any, ids: Tensor) -> None:
    outputs = [greedy(model, ids, streams=streams) for streams in (1, 2, 3, 4)]
    assert len({tuple(made.flatten().tolist()) for made in outputs}) == 4


def test_p_comes_back_after_an_error(model: Any, ids: Tensor) -> None:
    class Fails(StoppingCriteria):
        def __call__(self, *_: Any, **__: Any) -> Any:
            assert model.streams == 2
            raise RuntimeError("stopped")

    model.set_streams(3)
    with pytest.raises(RuntimeError, match="stopped"):
        greedy(model, ids, streams=2, stopping_criteria=[Fails()])
    assert model.streams == 3


@torch.no_grad()
@pytest.mark.parametrize("generating", [True, False])
def test_an_interrupted_prompt_leaves_nothing_behind(generating: bool, ids: Tensor) -> None:
    """Ctrl-C while stream 0 reads the prompt of all."""
    model = with_streams(build(), kv="shared", diversify=("prefix", "lora"))
    expected = model(ids).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.base_model.layers[1].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        greedy(model, ids) if generating else model(input_ids=ids, use_cache=True, logits_to_keep=1)
    hook.remove()
    assert torch.equal(model(ids).logits, expected)
    assert model.streams == 4


@pytest.mark.parametrize("streams", [0, 5, -1, True])
def test_a_p_that_was_not_trained_is_refused(model: Any, ids: Tensor, streams: Any) -> None:
    for call in (
        lambda: model.set_streams(streams),
        lambda: model.with_streams(streams),
        lambda: greedy(model, ids, streams=streams),
        lambda: model.generate_batch([[3, 4]], streams=streams),
    ):
        with pytest.raises(InputError, match=r"streams=.*has 4.*1 to 4"):
            call()
    assert model.streams == 4


def test_a_second_width_shares_every_weight(model: Any, ids: Tensor) -> None:
    narrow = model.with_streams(2)
    assert (model.streams, narrow.streams) == (4, 2)
    ours, theirs = dict(model.named_parameters()), dict(narrow.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(theirs[name] is parameter for name, parameter in ours.items())
    assert torch.equal(greedy(narrow, ids), greedy(model, ids, streams=2))
    narrow.set_attn_implementation("eager")
    assert model.config._attn_implementation == "parscale|sdpa"


def test_two_widths_in_two_threads(model: Any, ids: Tensor) -> None:
    """Requests at different P in one process: a model object for each p, one set of weights."""
    widths = {p: model.with_streams(p) for p in (1, 2, 3)}
    made: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda p=p, m=m: made.update({p: greedy(m, ids, max_new_tokens=24)}))
        for p, m in widths.items()
    ]
    for thread in threads:
        thread.start()
    expected = greedy(model, ids, max_new_tokens=24)
    for thread in threads:
        thread.join()
    assert torch.equal(expected, uncached(model, ids, new=24))
    for p, tokens in made.items():
        assert torch.equal(tokens, uncached(widths[p], ids, new=24))
    assert made.keys() == widths.keys()


def test_requests_at_different_p_by_regrouping(model: Any, ids: Tensor) -> None:
    """The recipe of docs/generate.md: one batch for each p."""
    asked = [4, 1, 4]
    answers: dict[int, Tensor] = {}
    for p in sorted(set(asked)):
        rows = [i for i, streams in enumerate(asked) if streams == p]
        answers |= dict(zip(rows, greedy(model, ids[rows], streams=p), strict=True))
    for i, p in enumerate(asked):
        assert torch.equal(answers[i][None], uncached(model.with_streams(p), ids[i : i + 1]))


@pytest.mark.parametrize("by", ["ids", "keyword", "embeddings", "batch"])
def test_a_prompt_longer_than_the_context_is_refused(model: Any, by: str) -> None:
    tokens = torch.ones(1, CONTEXT + 1, dtype=torch.long)
    calls = {
        "ids": lambda: model.generate(tokens),
        "keyword": lambda: model.generate(input_ids=tokens),
        "embeddings": lambda: model.generate(inputs_embeds=model.get_input_embeddings()(tokens)),
        "batch": lambda: model.generate_batch(tokens.tolist()),
    }
    with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens.*at most {CONTEXT}"):
        calls[by]()


def test_continuous_batching_on_an_older_transformers_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.__version__", "5.17.0")
    with pytest.raises(InputError, match=r"needs transformers >= 5\.23; this is 5\.17\.0"):
        model.init_continuous_batching()


def test_a_rope_that_stretches_may_go_beyond() -> None:
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    model = with_streams(build(rope_parameters=scaling))
    assert greedy(model, torch.ones(1, CONTEXT + 1, dtype=torch.long)).shape == (1, CONTEXT + 9)


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_a_p_for_each_row(ids: Tensor, kv: str) -> None:
    """One batch, a p for each of its rows, and for each beam of a row: what the row gets alone at that p."""
    asked = [4, 1, 2]
    model = with_streams(build(), kv=kv, diversify=("prefix", "embedding"))
    found = greedy(model, ids, streams=asked)
    beams = greedy(model, ids, streams=asked, num_beams=2)
    for i, p in enumerate(asked):
        narrow, row = model.with_streams(p), ids[i : i + 1]
        assert torch.equal(found[i][None], uncached(narrow, row))
        assert torch.equal(beams[i][None], greedy(narrow, row, num_beams=2, use_cache=False))
    assert model.streams == 4
    assert model.base_model.stream_state.run.row_mask is None


def test_a_p_for_each_row_needs_as_many_as_rows(ids: Tensor) -> None:
    model = with_streams(build(), kv="shared", diversify=("prefix", "lora"))
    for asked in ([4, 1], [4, 1, 2, 2, 2, 2]):
        with pytest.raises(InputError, match=f"for {len(ids)} prompts: give one number for each"):
            greedy(model, ids, streams=asked)
    for asked in ([3, 1, 2], HardTokens(1.0, 3)):
        model.set_streams(asked)
        with pytest.raises(InputError, match="continuous batching runs one p for all requests"):
            model.generate_batch(ids.tolist())


@torch.no_grad()
@pytest.mark.parametrize("aggregate", ["learned", "mean"])
def test_streams_that_a_row_did_not_ask_for_weigh_nothing(ids: Tensor, aggregate: str) -> None:
    model = with_streams(build(), aggregate=aggregate)
    model.set_streams([3, 2, 3])
    logits = model(ids).logits
    for i, p in enumerate([3, 2, 3]):
        narrow = model.with_streams(p)
        torch.testing.assert_close(logits[i], narrow(ids[i : i + 1]).logits[0], rtol=0, atol=1e-5)
    for rows in (1, 2):
        with pytest.raises(InputError, match=f"set for 3 rows, and the batch has {rows}"):
            model(ids[:rows])
    for wrong in ([], [1, 5], [0, 1]):
        with pytest.raises(InputError, match="1 to 4"):
            model.set_streams(wrong)
