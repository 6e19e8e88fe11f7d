"""The aggregation head and the merger against equations 3 and 4 written out, and against the released layout."""

from pathlib import Path
from typing import Any

import pytest
import torch

import parscale
from parscale import StreamsConfig
from parscale.streams.aggregate import AggregationHead, stream_weights
from parscale.streams.merge import merge
from tests.small import build

P, B, T, D = 3, 2, 4, 5


@pytest.fixture
def head() -> AggregationHead:
    made = AggregationHead(P, D, dtype=torch.float64)
    made[2].weight.data.normal_()
    made[2].bias.data.normal_()
    return made


@pytest.fixture
def hidden() -> torch.Tensor:
    return torch.randn(P, B, T, D, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_weights_and_merge_by_hand(head: AggregationHead, hidden: torch.Tensor, p: int, smoothing: float) -> None:
    """Token by token: channel h of stream p stands at h·P + p of the input; absent streams read as zero."""
    weights = stream_weights(hidden[:p], head, smoothing)
    merged = merge(hidden[:p], weights)
    for b in range(B):
        for t in range(T):
            x = torch.zeros(D * P, dtype=torch.float64)
            for stream in range(p):
                for h in range(D):
                    x[h * P + stream] = hidden[stream, b, t, h]
            logits = head[2](torch.nn.functional.silu(head[0](x)))[:p]
            expected = (1 - smoothing) * logits.exp() / logits.exp().sum() + smoothing / p
            torch.testing.assert_close(weights[:, b, t], expected)
            torch.testing.assert_close(merged[b, t], sum(w * hidden[i, b, t] for i, w in enumerate(expected)))


def test_weights_start_equal_and_learn() -> None:
    head = AggregationHead(P, D)
    hidden = torch.randn(P, B, T, D)
    weights = stream_weights(hidden, head, 0.1)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / P))
    merge(hidden, weights).square().sum().backward()
    assert head[2].weight.grad is not None
    assert (head[2].weight.grad.abs() > 0).all()


def test_a_random_start_prefers_streams_from_the_first_token() -> None:
    hidden = torch.randn(P, B, T, D)
    head = AggregationHead(P, D, "random")
    weights = stream_weights(hidden, head, 0.0)
    assert (weights - 1 / P).abs().max() > 0.01
    loaded = parscale.parallelize(build(), StreamsConfig(P, 4, head_init="random"))
    assert loaded.model.aggregate_layer[2].weight.std().item() == pytest.approx(32**-0.5, rel=0.3)
    assert (parscale.parallelize(build(), StreamsConfig(P, 4)).model.aggregate_layer[2].weight == 0).all()


@pytest.mark.parametrize("start", ["zero", "random"])
def test_a_plain_checkpoint_given_streams_by_keyword_starts_like_a_parallelized_model(
    start: str, tmp_path: Path
) -> None:
    build().save_pretrained(tmp_path)
    settings = StreamsConfig(P, 4, head_init=start)  # type: ignore[arg-type]
    with_streams = type(parscale.parallelize(build(), settings))
    given: Any = with_streams.from_pretrained(tmp_path, **settings.to_json())
    first, _, last = given.model.aggregate_layer
    assert first.weight.std().item() == pytest.approx((P * 32) ** -0.5, rel=0.1)
    assert last.weight.std().item() == pytest.approx(0 if start == "zero" else 32**-0.5, rel=0.3)
    assert not first.bias.any()
    assert not last.bias.any()


def test_smoothing_keeps_every_weight_above_its_share(head: AggregationHead, hidden: torch.Tensor) -> None:
    with torch.no_grad():
        head[2].weight.mul_(1e4)
        weights = stream_weights(hidden, head, 0.1)
    assert weights.min() >= 0.1 / P * 0.999
    torch.testing.assert_close(weights.sum(0), torch.ones(B, T, dtype=torch.float64))


def test_mean(hidden: torch.Tensor) -> None:
    weights = stream_weights(hidden[:2], None, 0.1)
    assert (weights == 0.5).all()
    torch.testing.assert_close(merge(hidden[:2], weights), hidden[:2].mean(0))


def test_softmax_is_float32_and_the_sum_returns_the_models_dtype() -> None:
    head = AggregationHead(P, D, dtype=torch.bfloat16)
    hidden = torch.randn(P, B, T, D, dtype=torch.bfloat16)
    weights = stream_weights(hidden, head, 0.1)
    assert weights.dtype == torch.float32
    assert merge(hidden, weights).dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("p", [2, 3])
def test_a_lora_on_the_head_counts_at_every_p(head: AggregationHead, hidden: torch.Tensor, p: int) -> None:
    peft = pytest.importorskip("peft")
    plain = stream_weights(hidden[:p], head, 0.1)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "2"], r=2, init_lora_weights=False), head)
    beside = stream_weights(hidden[:p], head, 0.1)
    for layer in (head[0], head[2]):
        layer.merge()
    torch.testing.assert_close(beside, stream_weights(hidden[:p], head, 0.1))
    assert (beside - plain).abs().max() > 1e-3


def test_names_and_shapes_are_the_released_ones() -> None:
    shapes = {name: tuple(p.shape) for name, p in AggregationHead(P, D).named_parameters()}
    assert shapes == {"0.weight": (D, P * D), "0.bias": (D,), "2.weight": (P, D), "2.bias": (P,)}
