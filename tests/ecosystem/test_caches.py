"""A cache that the streams of a pass did not fill: one line that names what is wrong and the remedy; or it is right.

The yardstick is the model without a cache, over the same rows.
"""

import copy
from functools import cache as remembered
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from parscale import InputError
from tests.contract.conftest import parallelized
from tests.contract.families import FAMILIES, VOCABULARY
from tests.ecosystem.grid import DIVERSIFIERS, cases

P, B, T = 3, 4, 9
CASES = cases({("llama", "prefix"), ("gemma3", "rank1+embedding"), ("qwen3_next", "prefix"), ("gpt2", "lora")})
KINDS = [DynamicCache, StaticCache]


@remembered
def _plain(name: str) -> Any:
    return next(family for family in FAMILIES if family.name == name).build()


@remembered
def _model(name: str, kind: str, kv: str) -> Any:
    return parallelized(copy.deepcopy(_plain(name)), kv=kv, **DIVERSIFIERS[kind])


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (B, T), generator=torch.Generator().manual_seed(3))


def _empty(model: Any, kind: Any) -> Any:
    return kind(config=model.config, **({"max_cache_len": 32} if kind is StaticCache else {}))


def _filled(model: Any, ids: Tensor, streams: int = P, kind: Any = DynamicCache) -> Any:
    """A cache of all tokens but the last."""
    cache = _empty(model, kind)
    model.set_streams(streams)
    model(ids[:, :-1], past_key_values=cache)
    return cache


def _goes_on(model: Any, ids: Tensor, cache: Any, streams: int = P) -> None:
    """The last token behind the cache has the logits that it has without one."""
    model.set_streams(streams)
    expected = model(ids, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "diversifiers", "kv"), CASES)
def test_filled_at_another_p(name: str, diversifiers: str, kv: str, kind: Any, ids: Tensor) -> None:
    model = _model(name, diversifiers, kv)
    for filled, now in ((3, 2), (2, 3), (3, 1), (1, 3)):
        # the last of these batches makes as many rows as there are
        for rows in {B, 2, *([2 * filled // now] if 2 * filled % now == 0 else [])}:
            cache = _filled(model, ids[:2], filled, kind)
            model.set_streams(now)
            before = copy.deepcopy(cache)
            if kv == "shared" and rows == 2:
                _goes_on(model, ids[:2], cache, now)
                continue
            wanted = "has 2 rows" if kv == "shared" else f"filled by {filled} streams, and {now} run now: call set_s"
            with pytest.raises(InputError, match=wanted) as refused:
                model(ids[:, -1:].repeat(2, 1)[:rows], past_key_values=cache)
            assert "\n" not in str(refused.value)
            for one, other in zip(cache.layers, before.layers, strict=True):  # nothing half-written
                assert not hasattr(one, "keys") or torch.equal(one.keys, other.keys)
            _goes_on(model, ids[:2], cache, filled)


@torch.no_grad()
@pytest.mark.parametrize(("name", "diversifiers", "kv"), CASES)
def test_by_generate(name: str, diversifiers: str, kv: str, ids: Tensor) -> None:
    model, options = _model(name, diversifiers, kv), {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    cache, mask = _filled(model, ids), torch.ones_like(ids)
    if kv == "own":
        with pytest.raises(InputError, match="filled by 3 streams, and 2 run now"):
            model.generate(ids, attention_mask=mask, past_key_values=cache, streams=2, **options)
    else:
        found = model.generate(ids, attention_mask=mask, past_key_values=cache, streams=2, **options)
        assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, streams=2, **options))
    assert model.streams == P


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "diversifiers", "kv"), CASES)
def test_filled_by_the_base_model(name: str, diversifiers: str, kv: str, kind: Any, ids: Tensor) -> None:
    """With shared keys and values it is of the right size, and may be meant: a first stream that is the base's."""
    model, plain = _model(name, diversifiers, kv), _plain(name)
    cache = _empty(plain, kind)
    plain(ids[:, :-1], past_key_values=cache)
    if kv == "own":
        for streams in (2, 3):
            model.set_streams(streams)
            with pytest.raises(InputError, match=f"has 4 rows, and {streams} .*need {streams * B} .*start a new cache"):
                model(ids[:, -1:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize(("name", "diversifiers", "kv"), CASES)
def test_rows_selected_by_hand(name: str, diversifiers: str, kv: str, streams: int, ids: Tensor) -> None:
    model = _model(name, diversifiers, kv)
    dropped, reordered = torch.tensor([0, 2]), torch.tensor([3, 3, 0, 1])
    for rows, select in ((dropped, "batch_select_indices"), (reordered, "reorder_cache")):
        if (name, select) == ("qwen3_next", "batch_select_indices"):
            continue  # transformers' recurrent layers have none
        cache = _filled(model, ids, streams)
        if kv == "shared":
            getattr(cache, select)(rows)
            _goes_on(model, ids[rows], cache, streams)
            continue
        cut = copy.deepcopy(cache)
        getattr(cut, select)(rows)
        with pytest.raises(InputError, match=r"select row b of a batch of B as the rows p·B \+ b of all streams"):
            model(ids[rows, -1:], past_key_values=cut)
        getattr(cache, select)((rows + B * torch.arange(streams)[:, None]).flatten())
        _goes_on(model, ids[rows], cache, streams)
        cache = model._reorder_cache(_filled(model, ids, streams), rows)
        _goes_on(model, ids[rows], cache, streams)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["own", "shared"])
def test_a_cache_that_was_emptied_goes_with_any_p(kv: str, ids: Tensor) -> None:
    """Also where its memory stays, with as many rows as another p and batch have."""
    model = _model("llama", "prefix", kv)
    for kind in KINDS:
        cache = _filled(model, ids[:2], 3, kind)
        cache.reset()
        now, rows = (2, 3) if kv == "own" else (2, 2)
        model.set_streams(now)
        model(ids[:rows, :-1], past_key_values=cache)
        _goes_on(model, ids[:rows], cache, now)


@torch.no_grad()
def test_a_copy_and_one_put_together_from_tensors_go_on(ids: Tensor) -> None:
    model = _model("llama", "prefix", "own")
    cache = _filled(model, ids)
    again = DynamicCache([(layer.keys, layer.values) for layer in cache.layers])
    for one in (copy.deepcopy(cache), again):
        _goes_on(model, ids, one)
    with pytest.raises(InputError, match="set_streams"):
        _goes_on(model, ids, copy.deepcopy(cache), 2)
