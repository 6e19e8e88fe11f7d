"""The closer look against what each number means, computed the long way."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from parscale.probe import token_losses, unmerged
from parscale.probe_details import probe_details, spectrum_streams
from parscale.probe_plot import draw_probe
from tests.small import build, with_streams

IDS = torch.arange(3, 51).view(2, 24)


@pytest.fixture
def model() -> Any:
    return with_streams(build(), diversify=("prefix", "lora"))


def test_loss_without_a_stream_is_that_of_the_weights_of_the_others(model: Any) -> None:
    seen = probe_details(model, IDS)
    with torch.no_grad(), unmerged(model):
        hidden = model.base_model(input_ids=IDS).last_hidden_state.unflatten(0, (4, 2))
    for stream, loss in enumerate(seen.loss_without):
        kept = [p for p in range(4) if p != stream]
        head, padded = model.base_model.aggregate_layer, hidden.clone()
        padded[stream] = 0
        with torch.no_grad():
            logits = head(padded)[..., kept]
            weights = 0.9 * logits.softmax(-1) + 0.1 / 3
            merged = sum(weights[..., i, None] * hidden[p] for i, p in enumerate(kept))
            expected = token_losses(model.lm_head(merged), IDS).mean().item()
        assert loss == pytest.approx(expected, abs=1e-5)


def test_attention_on_the_prefix_is_that_of_the_eager_weights(model: Any) -> None:
    seen = probe_details(model, IDS)
    assert model.config._attn_implementation == "parscale|sdpa"
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(input_ids=IDS, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        for stream in range(4):
            rows = weights[2 * stream : 2 * stream + 2, :, :, :5]
            assert seen.prefix_attention[layer][stream] == pytest.approx(rows.sum(-1).mean().item(), abs=1e-6)
    first = torch.stack(attentions)[..., :3, :5].sum(-1).unflatten(1, (4, 2)).mean((0, 2, 3, 4))
    assert seen.prefix_attention_by_position[0] == pytest.approx(first.tolist(), abs=1e-6)


def test_gradient_share_by_stream(model: Any) -> None:
    shares = probe_details(model, IDS).gradient_share
    model(input_ids=IDS, labels=IDS).loss.backward()
    squares = torch.zeros(4)
    for name, parameter in model.named_parameters():
        if "prefix_" in name or "stream_lora" in name:
            squares += parameter.grad.flatten(1).square().sum(1)
    assert shares == pytest.approx((squares / squares.sum()).tolist(), abs=1e-5)
    assert all(p.grad is None for p in with_streams(build()).parameters())


def test_a_generator_of_prefixes_is_no_stream() -> None:
    """Its biases have no row for each stream, and the banks that it stands in for get no gradient."""
    generated = {"prefix_init": "reparameterized"}
    assert probe_details(with_streams(build(), **generated), IDS).gradient_share == []
    model = with_streams(build(), diversify=("prefix", "lora"), **generated)
    shares = probe_details(model, IDS).gradient_share
    model(input_ids=IDS, labels=IDS).loss.backward()
    squares = torch.zeros(4)
    for name, parameter in model.named_parameters():
        if "stream_lora" in name:
            squares += parameter.grad.flatten(1).square().sum(1)
    assert shares == pytest.approx((squares / squares.sum()).tolist(), abs=1e-5)


def test_spectrum_counts_directions() -> None:
    basis = torch.randn(3, 1, 50, 8)
    assert spectrum_streams(basis[:1].repeat(3, 1, 1, 1)) == pytest.approx(1, abs=1e-4)
    unit = torch.linalg.qr((basis - basis.mean(2, keepdim=True)).flatten(1).T).Q.T.view(3, 1, 50, 8)
    assert spectrum_streams(unit - unit.mean(2, keepdim=True)) == pytest.approx(3, abs=0.05)


def test_states_of_a_model_that_has_diverged_have_no_spectrum() -> None:
    assert math.isnan(spectrum_streams(torch.full((2, 1, 3, 4), torch.nan)))


def test_theory_beside_the_measured_gain(model: Any) -> None:
    control = with_streams(build(), streams=1)
    seen = probe_details(model, IDS, control=control)
    rho = seen.probe.error_correlation
    assert rho is not None
    assert seen.loss_factor == pytest.approx((3 * rho + 1) / 4)
    with torch.no_grad():
        losses = [m(input_ids=IDS, labels=IDS).loss.item() for m in (control, model)]
    assert seen.gain == pytest.approx(losses[0] - losses[1], abs=1e-5)


@pytest.mark.parametrize("streams", [{"streams": 1}, {"prefix_tokens": 0, "diversify": ("lora",)}, {"kv": "shared"}])
def test_draws_whatever_the_streams_are(streams: dict[str, Any], tmp_path: Path) -> None:
    details = probe_details(with_streams(build(), **streams), IDS)
    assert draw_probe(details, tmp_path / "probe.png").stat().st_size > 10_000
