"""A prefix in front of the keys, against attention written out: every mask, every implementation, any length."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from parscale import StreamsConfig
from parscale.streams.attention import LONG, attend, flex_mask
from parscale.streams.state import StreamState
from tests.small import build, with_streams

P, B, H, HK, N, D, E = 3, 2, 4, 2, 5, 8, 6
BOTH: Any = ("prefix", "lora")


class Layer(nn.Module):
    """An attention module, as far as `attend` looks at one."""

    def __init__(self, key_size: int = D, value_size: int = E) -> None:
        super().__init__()
        self.layer_idx = 0
        self.num_key_value_groups = H // HK
        self.is_causal = True
        self.stream_state = StreamState(StreamsConfig(streams=P, prefix_tokens=N))
        self.prefix_k = nn.Parameter(torch.randn(P, HK, N, key_size))
        self.prefix_v = nn.Parameter(torch.randn(P, HK, N, value_size))


Layer.__module__ = "transformers.models.llama.modeling_llama"  # where eager's function is looked for


def by_hand(layer: Layer, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor) -> Tensor:
    """softmax(q·[prefix_k; k]/√D)·[prefix_v; v] row by row, float64; `allowed` (T, S) or (B, T, S) for real tokens."""
    out = torch.zeros(query.shape[0], query.shape[2], H, value.shape[-1], dtype=torch.float64)
    for row in range(query.shape[0]):
        stream, b = divmod(row, B)
        for head in range(H):
            kv = head // (H // HK)
            keys = torch.cat([layer.prefix_k[stream, kv], key[row, kv]]).double()
            values = torch.cat([layer.prefix_v[stream, kv], value[row, kv]]).double()
            scores = query[row, head].double() @ keys.T * D**-0.5
            mask = allowed[b] if allowed.ndim == 3 else allowed
            seen = torch.cat([torch.ones(len(mask), N, dtype=torch.bool), mask], dim=1)
            out[row, :, head] = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values
    return out


def inputs(queries: int, keys: int, value_size: int = E) -> tuple[Tensor, Tensor, Tensor]:
    rows = P * B
    return torch.randn(rows, H, queries, D), torch.randn(rows, HK, keys, D), torch.randn(rows, HK, keys, value_size)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 7])
def test_no_mask_means_causal(length: int) -> None:
    """sdpa's wrapper cuts the keys to as many as there are queries when it gets None: the last tokens would vanish."""
    layer, (query, key, value) = Layer(), inputs(length, length)
    triangle = torch.ones(length, length, dtype=torch.bool).tril()
    close(attend(layer, query, key, value, None, implementation="sdpa")[0], by_hand(layer, query, key, value, triangle))


@torch.no_grad()
def test_no_mask_on_a_longer_static_cache() -> None:
    """Slots behind the prompt are empty yet, and must not be seen."""
    layer, (query, key, value) = Layer(), inputs(4, 9)
    triangle = torch.ones(4, 9, dtype=torch.bool).tril()
    close(attend(layer, query, key, value, None, implementation="sdpa")[0], by_hand(layer, query, key, value, triangle))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("queries", [1, 3])
def test_masks_cover_real_tokens_only(implementation: str, queries: int) -> None:
    """A row of padding alone still sees the prefix."""
    layer, (query, key, value) = Layer(), inputs(queries, 6)
    allowed = torch.rand(B, queries, 6) < 0.6
    allowed[0, -1] = False
    expected = by_hand(layer, query, key, value, allowed)
    boolean = allowed[:, None].repeat(P, 1, 1, 1)
    additive = torch.where(boolean, 0.0, torch.finfo(torch.float32).min)
    for mask in [additive] if implementation == "eager" else [additive, boolean]:
        close(attend(layer, query, key, value, mask, implementation=implementation, scaling=D**-0.5)[0], expected)


@torch.no_grad()
def test_one_token_without_mask_sees_all() -> None:
    layer, (query, key, value) = Layer(), inputs(1, 6)
    expected = by_hand(layer, query, key, value, torch.ones(1, 6, dtype=torch.bool))
    for scaling in (None, D**-0.5):
        close(attend(layer, query, key, value, None, implementation="sdpa", scaling=scaling)[0], expected)
    with torch.enable_grad():  # the path through sdpa itself
        close(attend(layer, query, key, value, None, implementation="sdpa")[0], expected)


@torch.no_grad()
def test_half_precision_stays_finite_and_close() -> None:
    layer, (query, key, value) = Layer(), inputs(1, 6)
    expected = by_hand(layer, query, key, value, torch.ones(1, 6, dtype=torch.bool))
    found = attend(layer, *(x.bfloat16() for x in (query, key, value)), None, implementation="sdpa")[0]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv", ["own", "shared", "one prefix"])
@pytest.mark.parametrize("masked", ["no", "boolean", "additive"])
def test_one_token_in_two_bytes_by_the_fused_kernel(dtype: torch.dtype, kv: Any, masked: str) -> None:
    """Keys and values as long as each other, as the kernel wants them; a row of padding alone sees the prefix."""
    layer = Layer(value_size=D)
    if kv == "one prefix":
        layer.prefix_k.data, layer.prefix_v.data = layer.prefix_k[:1], layer.prefix_v[:1]
    if kv != "own":
        layer.stream_state = StreamState(
            StreamsConfig(P, N, kv="shared", shared_prefix=kv == "one prefix", diversify=BOTH)
        )
    query, key, value = (x.to(dtype) for x in inputs(1, 600, D))
    if kv != "own":
        key, value = (x[:B].repeat(P, 1, 1, 1) for x in (key, value))
    allowed = torch.ones(B, 1, 600, dtype=torch.bool)
    mask = None
    if masked != "no":
        allowed = torch.rand(B, 1, 600) < 0.6
        allowed[0] = False
        mask = allowed[:, None].repeat(P, 1, 1, 1)
        mask = mask if masked == "boolean" else torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
    whole = Layer(value_size=D)
    whole.prefix_k.data, whole.prefix_v.data = (x.expand(P, -1, -1, -1) for x in (layer.prefix_k, layer.prefix_v))
    expected = by_hand(whole, query, key, value, allowed)
    found = attend(layer, query, key, value, mask, implementation="sdpa")[0]
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0.02)


@torch.no_grad()
def test_fewer_streams() -> None:
    layer, (query, key, value) = Layer(), inputs(3, 3)
    layer.stream_state.set(streams=2)
    part = [x[: 2 * B] for x in (query, key, value)]
    expected = by_hand(layer, *part, torch.ones(3, 3, dtype=torch.bool).tril())
    close(attend(layer, *part, None, implementation="sdpa")[0], expected)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without", "ignore::DeprecationWarning")
@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("start", [0, 3])
def test_flex(window: int | None, start: int) -> None:
    """The BlockMask's columns start n before the real tokens, and padding hides real tokens only."""
    length = 7
    layer, (query, key, value) = Layer(value_size=D), inputs(length - start, length, D)
    padding = torch.ones(B, length, dtype=torch.bool)
    padding[1, :4] = False
    function = causal_mask_function if window is None else sliding_window_causal_mask_function(window)
    config: Any = SimpleNamespace(parscale_n=P, parscale_n_tokens=N)
    with torch.compiler.set_stance("force_eager"):
        mask = flex_mask(
            batch_size=P * B, q_length=length - start, kv_length=length, q_offset=start, mask_function=function,
            attention_mask=padding.repeat(P, 1), config=config,
        )  # fmt: skip
        found = attend(layer, query, key, value, mask, implementation="flex_attention", scaling=D**-0.5)[0]
    q, kv = torch.arange(start, length)[:, None], torch.arange(length)
    seen = (kv <= q) & (kv > q - (window or length))
    close(found, by_hand(layer, query, key, value, seen & padding[:, None]))


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_a_long_prompt_is_as_a_short_one(kv: str) -> None:
    """Beyond `LONG` the mask gives way to queries that nobody reads: logits and gradients are eager attention's."""
    model = with_streams(build(max_position_embeddings=2 * LONG), kv=kv, streams=2)
    ids = torch.randint(3, 97, (2, LONG + 20), generator=torch.Generator().manual_seed(0))
    results = []
    for backend in ("sdpa", "eager"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        output = model(ids, labels=ids)
        output.loss.backward()
        results.append([output.logits.detach()] + [p.grad for n, p in model.named_parameters() if "prefix_" in n])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
