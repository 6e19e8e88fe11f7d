"""Every KV cache of transformers, and what callers do to it: the tokens stay those of decoding without a cache."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, QuantizedLayer

from tests.small import NEW, build, greedy, uncached, with_streams


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_chunked_prefill(model: Any, ids: Tensor, chunk: int) -> None:
    assert torch.equal(greedy(model, ids, prefill_chunk_size=chunk), uncached(model, ids))


def test_a_callers_own_cache_is_filled_and_used(model: Any, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    made = greedy(model, ids, past_key_values=cache)
    assert torch.equal(made, uncached(model, ids))
    assert cache.get_seq_length() == made.shape[1] - 1  # real tokens only, the last one not yet run
    assert cache.layers[0].keys is not None
    assert cache.layers[0].keys.shape[0] == model.cached_streams * ids.shape[0]
    assert torch.equal(greedy(model, made, past_key_values=cache), uncached(model, made))


def test_a_conversation_keeps_its_cache(model: Any, ids: Tensor) -> None:
    """Each turn adds tokens of the user's; the answer is that to the whole conversation."""
    cache, said = DynamicCache(config=model.config), ids[:1, :0]
    for turn in ids.split(3, dim=1):
        said = torch.cat([said, turn[:1]], dim=1)
        said = greedy(model, said, past_key_values=cache)
    assert torch.equal(said, uncached(model, said[:, :-NEW]))


def test_crop_and_go_on(model: Any, ids: Tensor) -> None:
    cache = DynamicCache(config=model.config)
    made = greedy(model, ids, past_key_values=cache)
    cache.crop(6 - cache.get_seq_length())
    assert cache.get_seq_length() == 6
    other = torch.cat([made[:, :6], ids[:, 6:].flip(1)], dim=1)
    assert torch.equal(greedy(model, other, past_key_values=cache), uncached(model, other))


def test_roll_back_a_few_tokens(model: Any, ids: Tensor) -> None:
    """As speculation does."""
    cache = DynamicCache(config=model.config)
    greedy(model, ids, past_key_values=cache)
    cache.crop(-3)
    assert cache.get_seq_length() == ids.shape[1] + NEW - 1 - 3
    start = uncached(model, ids)[:, :-3]
    assert torch.equal(greedy(model, start, past_key_values=cache), uncached(model, start))


def test_static_cache(model: Any, ids: Tensor) -> None:
    assert torch.equal(greedy(model, ids, cache_implementation="static"), uncached(model, ids))
    assert torch.equal(greedy(model, ids[:1], cache_implementation="static"), uncached(model, ids[:1]))


def test_static_cache_filled_in_chunks(model: Any, ids: Tensor) -> None:
    """transformers then makes the cache before the first step, for as many rows as it is told."""
    made = greedy(model, ids, cache_implementation="static", prefill_chunk_size=4)
    assert torch.equal(made, uncached(model, ids))


def test_static_cache_follows_the_number_of_streams(model: Any, ids: Tensor) -> None:
    for streams in (4, 2, 4):
        made = greedy(model, ids, cache_implementation="static", streams=streams)
        assert torch.equal(made, uncached(model.with_streams(streams), ids))


def test_a_callers_own_static_cache(model: Any, ids: Tensor) -> None:
    cache = StaticCache(config=model.config, max_cache_len=40)
    assert torch.equal(greedy(model, ids, past_key_values=cache), uncached(model, ids))


def test_beams_in_a_static_cache(model: Any, ids: Tensor) -> None:
    made = greedy(model, ids, num_beams=3, cache_implementation="static")
    assert torch.equal(made, greedy(model, ids, num_beams=3, use_cache=False))


class LosslessLayer(QuantizedLayer):
    """transformers' quantised cache with a code that loses nothing: integers of the same bits."""

    def _quantize(self, tensor: Tensor, axis: int) -> Tensor:
        return tensor.view(torch.int32)

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor.view(torch.float32)


def test_quantised_cache(model: Any, ids: Tensor) -> None:
    """Quantising is transformers' and the backend's work; that each stream's rows come back is ours."""
    layers = [LosslessLayer(residual_length=4) for _ in range(model.config.num_hidden_layers)]
    assert torch.equal(greedy(model, ids, past_key_values=Cache(layers=layers)), uncached(model, ids))
    assert layers[0]._quantized_keys.dtype == torch.int32
    assert layers[0]._quantized_keys.shape[:2] == (model.cached_streams * ids.shape[0], 2)


@pytest.mark.slow
def test_quantised_cache_with_a_real_backend(model: Any, ids: Tensor) -> None:
    """Four bits lose something: the logits stay near, and decoding runs to its end."""
    pytest.importorskip("optimum.quanto", reason="optimum-quanto is not installed")
    options = {"return_dict_in_generate": True, "output_scores": True}
    settings = {"backend": "quanto", "nbits": 4, "residual_length": 4, "q_group_size": 16}
    made = greedy(model, ids, cache_implementation="quantized", cache_config=settings, **options)
    exact = greedy(model, ids, **options)
    torch.testing.assert_close(made.scores[1], exact.scores[1], atol=1.0, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="offloading needs a GPU")
@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_cache(ids: Tensor, kind: str) -> None:
    model = with_streams(build()).cuda()
    assert torch.equal(greedy(model, ids.cuda(), cache_implementation=kind), uncached(model, ids.cuda()))


class Allocations(TorchDispatchMode):
    """The elements of each operation's output that is no view, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        held = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in held:
            self.made.append((str(func), out.numel()))
        return out


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_a_decoded_token_copies_no_keys_and_no_values(kind: Any, padded: bool) -> None:
    """At 512 tokens of context nothing as large as one layer's keys is made, but by `DynamicCache` itself: two
    concatenations a layer, as for any model. The prefix is never joined to the cache."""
    context, model = 512, with_streams(build(max_position_embeddings=1024, head_dim=32))
    cache = kind(config=model.config, **({"max_cache_len": context + 1} if kind is StaticCache else {}))
    tokens = torch.randint(3, 97, (2, context))
    mask = torch.ones(2, context + 1, dtype=torch.long)
    mask[0, : 7 if padded else 0] = 0
    model(tokens, attention_mask=mask[:, :-1], past_key_values=cache)
    with Allocations() as allocations:
        model(tokens[:, :1], attention_mask=mask, past_key_values=cache)
    keys = 4 * 2 * model.config.num_key_value_heads * context * 32
    large = [operation for operation, elements in allocations.made if elements >= keys // 2]
    layers = model.config.num_hidden_layers
    assert large == ([] if kind is StaticCache else ["aten.cat.default"] * 2 * layers)
