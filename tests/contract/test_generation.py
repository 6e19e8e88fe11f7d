"""With a KV cache or without: the same logits and the same tokens, whatever the cache and the search."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.contract.conftest import B, Case, T
from tests.contract.reference import truth

NEW = 6


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(1,) * T, (5, 1, 1, 1, 1), (4, 3, 2)], ids=["tokens", "prompt-tokens", "chunks"])
def test_cached_equals_uncached(case: Case, ids: Tensor, chunks: tuple[int, ...]) -> None:
    cache = DynamicCache(config=case.model.config)
    steps = [case.model(part, past_key_values=cache).logits for part in ids.split(chunks, dim=1)]
    truth(case.plain, case.model, ids).close(torch.cat(steps, dim=1))
    assert cache.get_seq_length() == T  # the caller's own cache is filled, with real tokens only


@torch.no_grad()
def test_cached_with_fewer_streams(case: Case, ids: Tensor) -> None:
    model = case.build(diversify=("prefix", "embedding"))
    model.set_streams(2)
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split((6, 1, 1, 1), dim=1)]
    truth(case.plain, model, ids, streams=2).close(torch.cat(steps, dim=1))


@torch.no_grad()
def test_greedy_is_the_uncached_argmax(case: Case, ids: Tensor) -> None:
    assert torch.equal(greedy(case, ids), argmax_loop(case.model, ids))


@torch.no_grad()
def test_left_padded_rows_generate_as_alone(case: Case, ids: Tensor) -> None:
    padded = torch.cat([torch.zeros(B, 3, dtype=torch.long), ids], dim=1)
    padded[1, :3] = ids[1, :3]
    mask = torch.ones_like(padded)
    mask[0, :3] = 0
    generated = greedy(case, padded, attention_mask=mask)[:, -NEW:]
    assert torch.equal(generated[:1], argmax_loop(case.model, padded[:1, 3:])[:, -NEW:])
    assert torch.equal(generated[1:], argmax_loop(case.model, padded[1:])[:, -NEW:])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [None, 4], ids=["prompt", "chunks"])
def test_static_cache(trained_case: Case, ids: Tensor, chunk: int | None) -> None:
    """In chunks, transformers makes the cache before it has seen a row: for as many rows as it is told."""
    if trained_case.family.recurrent:
        pytest.skip("transformers has no static cache for recurrent layers")
    found = greedy(trained_case, ids, cache_implementation="static", prefill_chunk_size=chunk)
    assert torch.equal(found, argmax_loop(trained_case.model, ids))


@torch.no_grad()
def test_beam_search(trained_case: Case, ids: Tensor) -> None:
    cached = greedy(trained_case, ids, num_beams=3)
    assert torch.equal(cached, greedy(trained_case, ids, num_beams=3, use_cache=False))


@torch.no_grad()
def test_prompt_lookup(trained_case: Case, ids: Tensor) -> None:
    """Speculation crops the cache: it must count real tokens only."""
    if trained_case.family.recurrent:
        pytest.skip("a recurrent state cannot be cropped")
    prompt = ids[:1].repeat(1, 2)
    assert torch.equal(
        greedy(trained_case, prompt, prompt_lookup_num_tokens=3), argmax_loop(trained_case.model, prompt)
    )


@torch.no_grad()
def test_chunked_prefill(trained_case: Case, ids: Tensor) -> None:
    assert torch.equal(greedy(trained_case, ids, prefill_chunk_size=4), argmax_loop(trained_case.model, ids))


def greedy(case: Case, ids: Tensor, **options: Any) -> Tensor:
    options = {"attention_mask": torch.ones_like(ids)} | options
    return case.model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, **options)


def argmax_loop(model: Any, ids: Tensor) -> Tensor:
    """The definition of greedy decoding: the whole sequence anew for each token."""
    for _ in range(NEW):
        logits = model(ids, use_cache=False).logits[:, -1]
        logits[:, model.config.eos_token_id] = -torch.inf  # as min_new_tokens does
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids
