"""The looks at a trained model, against formulas written out."""

import pytest
import torch
from torch.nn import functional as F

from parscale.experiments.measure import correlation, measure
from parscale.probe import unmerged
from tests.small import VOCABULARY, build, with_streams


def test_ways_to_merge_are_what_they_are_called() -> None:
    model, control = with_streams(build()).double(), build().double()
    ids = torch.randint(2, VOCABULARY, (6, 16))
    targets = ids[:, 1:]

    def loss(log_probabilities: torch.Tensor) -> float:
        return F.nll_loss(log_probabilities[:, :-1].flatten(0, 1), targets.flatten()).item()

    with torch.no_grad():
        merged = loss(model(ids).logits.log_softmax(-1))
        first = loss(model.with_streams(1)(ids).logits.log_softmax(-1))
        with unmerged(model):
            alone = model(ids).logits.unflatten(0, (4, -1))
        errors = [
            -logits.log_softmax(-1)[:, :-1].gather(2, targets[..., None]) for logits in (*alone, control(ids).logits)
        ]
    seen = measure(model, ids, control=control, rows=4)
    assert seen["merged"] == seen["at"]["4"] == pytest.approx(merged, rel=1e-5)
    assert seen["at"]["1"] == pytest.approx(first, rel=1e-5)
    assert seen["alone"] == pytest.approx([loss(logits.log_softmax(-1)) for logits in alone], rel=1e-5)
    assert seen["uniform"] == pytest.approx(loss(alone.mean(0).log_softmax(-1)), rel=1e-5)  # the mean of the logits
    assert seen["probabilities"] == pytest.approx(loss(alone.softmax(-1).mean(0).log()), rel=1e-5)
    pairs = torch.corrcoef(torch.stack([(e - errors[-1]).flatten() for e in errors[:-1]]))
    assert seen["rho"] == pytest.approx(pairs[~torch.eye(4, dtype=torch.bool)].mean().item(), rel=1e-4)
    assert len(seen["rho_by_position"]) == len(seen["prefix_attention_by_position"]) == 8
    assert model.streams == 4
    assert model.base_model.stream_state.run is model.base_model.stream_state.default


def test_one_stream_has_nothing_to_tell() -> None:
    assert measure(build(), torch.zeros(2, 8, dtype=torch.long)) == {}


def test_equal_errors_are_fully_correlated() -> None:
    error = torch.randn(1, 3, 5)
    assert correlation(error.expand(4, 3, 5)) == pytest.approx(1.0)
    assert correlation(torch.cat([error, -error])) == pytest.approx(-1.0)
