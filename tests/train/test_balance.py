"""What keeps the streams in use: each penalty by its formula, each schedule at its steps, and nothing left behind."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState

from parscale import InputError, StreamsConfig
from parscale.train.balance import StreamBalance, entropy, load_imbalance, squared_correlation
from parscale.train.config import Balance
from parscale.train.data import PackedText
from parscale.train.trainer import train
from tests.small import build, with_streams
from tests.train.conftest import run

P, B, T, D = 4, 3, 5, 32


def hook(settings: Balance, **streams: Any) -> tuple[Any, StreamBalance]:
    model = with_streams(build(), **streams)
    return model.train(), StreamBalance(model, settings, seed=0)


def begin(callback: StreamBalance, step: int, steps: int = 100) -> None:
    callback.on_step_begin(None, TrainerState(global_step=step, max_steps=steps), TrainerControl())


def end(callback: StreamBalance) -> None:
    callback.on_step_end(None, None, None)


def test_smoothing_falls_to_the_models_own() -> None:
    model, callback = hook(Balance(smoothing_start=1.0, smoothing_share=0.5), smoothing=0.1)
    seen = {}
    for step in (0, 25, 50, 99):
        begin(callback, step)
        seen[step] = model.base_model.stream_state.run.smoothing
        end(callback)
    assert seen == pytest.approx({0: 1.0, 25: 0.55, 50: 0.1, 99: 0.1})
    assert model.base_model.stream_state.run.smoothing == 0.1


def test_temperature_falls_to_one_and_divides_the_logits() -> None:
    model, callback = hook(Balance(temperature_start=9.0, smoothing_share=0.5))
    cooled = with_streams(build())
    cooled.load_state_dict(model.state_dict())
    ids, seen = torch.arange(12).view(2, 6), {}
    for step in (0, 25, 50, 99):
        begin(callback, step)
        seen[step] = model.base_model.stream_state.run.temperature
        for of_last, own in zip(cooled.base_model.aggregate_layer[2].parameters(), head_of(model), strict=True):
            of_last.data.copy_(own / seen[step])
        torch.testing.assert_close(model(ids).logits, cooled(ids).logits)
        end(callback)
    assert seen == {0: 9.0, 25: 5.0, 50: 1.0, 99: 1.0}
    assert model.base_model.stream_state.run.temperature == 1.0


def head_of(model: Any) -> Any:
    """Weight and bias of the aggregation head's last layer."""
    return model.base_model.aggregate_layer[2].parameters()


def test_smoothing_of_one_is_the_mean_of_the_streams() -> None:
    model, callback = hook(Balance(smoothing_start=1.0))
    mean = with_streams(build(), aggregate="mean")
    mean.load_state_dict(model.state_dict(), strict=False)
    ids = torch.arange(12).view(2, 6)
    begin(callback, 0)
    torch.testing.assert_close(model(ids).logits, mean(ids).logits)


def test_penalties_by_their_formulas() -> None:
    weights = torch.rand(P, B, T).softmax(0)
    chosen = [sum(int(weights[:, b, t].argmax()) == p for b in range(B) for t in range(T)) / (B * T) for p in range(P)]
    expected = P * sum(f * weights[p].mean().item() for p, f in enumerate(chosen)) - 1
    assert load_imbalance(weights).item() == pytest.approx(expected)
    assert load_imbalance(torch.eye(P)[0].view(P, 1, 1).expand(P, B, T)).item() == pytest.approx(P - 1)
    assert entropy(torch.full((P, B, T), 1 / P)).item() == pytest.approx(math.log(P))
    hidden = torch.randn(2, B, T, D)
    a, b = (h.flatten() for h in hidden - hidden.mean((0, 1, 2)))
    correlation = (a @ b / (a.norm() * b.norm())).item()
    assert squared_correlation(hidden).item() == pytest.approx(correlation**2, rel=1e-4)
    assert squared_correlation(hidden[:1].repeat(3, 1, 1, 1)).item() == pytest.approx(1)


def test_penalty_of_a_step_reaches_streams_and_head() -> None:
    settings = Balance(load_balance=0.5, entropy_floor=4.0, decorrelation=2.0)
    model, callback = hook(settings)
    begin(callback, 0)
    hidden: list[Any] = []
    state = model.base_model.stream_state
    observe = state.run.observer
    state.set(observer=lambda h, w: (hidden.append((h, w)), observe(h, w)))
    model(torch.arange(12).view(2, 6))
    penalty = callback.take_penalty()
    (h, w) = hidden[0]
    expected = 0.5 * load_imbalance(w) + (math.log(4) - entropy(w)) + 2 * squared_correlation(h)
    assert penalty is not None
    assert penalty.item() == pytest.approx(expected.item())
    penalty.backward()
    assert model.base_model.aggregate_layer[2].weight.grad.abs().sum() > 0
    assert all(layer.self_attn.prefix_k.grad.abs().sum() > 0 for layer in model.model.layers)
    assert callback.take_penalty() is None
    end(callback)
    model(torch.arange(12).view(2, 6))
    assert callback.take_penalty() is None


def test_dropped_streams_are_left_out_and_come_back() -> None:
    model, callback = hook(Balance(stream_dropout=0.5))
    state, ids = model.base_model.stream_state, torch.arange(12).view(2, 6)
    shares: list[float] = []
    for step in range(40):
        begin(callback, step)
        kept: Any = state.run.row_mask
        shares.append(kept.float().mean().item())
        assert kept.shape == (4, 1)
        assert kept.any()
        weights: list[Any] = []
        state.set(observer=lambda h, w, seen=weights: seen.append(w))
        model(ids)
        assert torch.equal(weights[0] > 0, kept[..., None].expand(4, 2, 6)), "a stream that counts has weight, no other"
        end(callback)
        assert state.run.row_mask is None
    assert 0.4 < sum(shares) / len(shares) < 0.65


def test_some_steps_run_fewer_streams() -> None:
    model, callback = hook(Balance(fewer_streams=0.5))
    seen = []
    for step in range(200):
        begin(callback, step)
        seen.append(model.streams)
        end(callback)
        assert model.streams == 4
    assert 60 < seen.count(4) < 140
    assert set(seen) == {1, 2, 3, 4}
    again = []
    for step in range(200):  # a resumed run draws the same
        begin(callback, step)
        again.append(model.streams)
        end(callback)
    assert again == seen


def test_a_run_trains_with_them(base: Path, text: PackedText, tmp_path: Path) -> None:
    settings = Balance(
        smoothing_start=1.0, temperature_start=4.0, load_balance=0.01, decorrelation=0.01, stream_dropout=0.1
    )
    streams = StreamsConfig(2, 8, diversify=("prefix", "lora"))
    plain, balanced = (
        train(run("retrofit", tmp_path / str(i), model=str(base), streams=streams, balance=b), data=text)
        for i, b in enumerate((Balance(), settings))
    )
    assert balanced.validation_loss < balanced.start_loss
    assert balanced.validation_loss != plain.validation_loss


@pytest.mark.parametrize(
    "wrong",
    [
        {"smoothing_start": 2.0},
        {"temperature_start": 0.5},
        {"load_balance": -1.0},
        {"stream_dropout": 1.5},
        {"smoothing_share": 0.0},
    ],
)
def test_impossible_values_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        Balance(**wrong)
