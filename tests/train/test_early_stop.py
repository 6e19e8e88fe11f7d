"""The running mean of the validation loss, and stopping by it."""

from pathlib import Path

import pytest

from parscale.config import StreamsConfig
from parscale.train.data import PackedText
from parscale.train.trainer import train
from tests.train.conftest import run

STREAMS = StreamsConfig(1, 4)


def evaluations(result) -> list[tuple[int, float, float]]:
    return [(row["step"], row["eval_loss"], row["eval_loss_smooth"]) for row in result.history if "eval_loss" in row]


def test_the_running_mean(base: Path, text: PackedText, tmp_path: Path) -> None:
    config = run("frozen", tmp_path / "out", model=str(base), streams=STREAMS, evaluations=3, smooth_validation=0.8)
    rows = evaluations(train(config, data=text))
    assert [step for step, _, _ in rows] == [2, 4, 5], "evenly spread, and the last at the end"
    mean = rows[0][1]
    for _, loss, smooth in rows:
        mean = 0.8 * mean + 0.2 * loss
        assert smooth == pytest.approx(mean, abs=1e-9)


def test_a_run_that_gets_no_better_stops(base: Path, text: PackedText, tmp_path: Path) -> None:
    settings = {"streams": STREAMS, "tokens": 30 * 256, "evaluations": 30, "warmup": 0.0}
    # far too fast: the loss rises from the first step
    worse = {"learning_rate": 1.0, "stream_learning_rate": 1.0}
    config = run("retrofit", tmp_path / "worse", model=str(base), patience=3, **settings, **worse)
    result = train(config, data=text)
    assert result.steps == len(evaluations(result)) < 30
    assert result.tokens == result.steps * 256
    means = [smooth for _, _, smooth in evaluations(result)]
    assert min(means) == means[-4], "three evaluations after the best"


def test_a_run_that_gets_better_goes_on(base: Path, text: PackedText, tmp_path: Path) -> None:
    config = run(
        "retrofit", tmp_path / "out", model=str(base), streams=STREAMS, patience=2, evaluations=5, learning_rate=1e-3
    )
    assert train(config, data=text).steps == 5
