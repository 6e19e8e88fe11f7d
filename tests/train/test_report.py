"""The control beside a run, and what the report says of both."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model
from parscale.probe_details import probe_details
from parscale.probe_plot import draw_probe
from parscale.train.config import TrainConfig
from parscale.train.prepare import prepare
from parscale.train.report import control_of
from parscale.train.report import run as run_and_report
from parscale.train.trainer import train
from parscale.train.watch import CLOSELY
from tests.train.conftest import run

TEXT = {"vocab_size": 384, "validation_blocks": 16}


@pytest.fixture
def config(base: Path, corpus: Path, tmp_path: Path) -> TrainConfig:
    streams = StreamsConfig(2, 4, diversify=("prefix", "lora"), lora_rank=2)
    return run(
        "retrofit", tmp_path / "out", model=str(base), streams=streams, data=(str(corpus),), cache_dir=tmp_path, **TEXT
    )


def test_the_control_sees_the_same_tokens_and_the_gain_is_over_it(config: TrainConfig, capsys) -> None:
    result = run_and_report(replace(config, control=True, forgetting=config.data))
    record = json.loads((config.output / "train.json").read_text())
    control, printed = record["control"], capsys.readouterr().out
    assert control["streams"] == StreamsConfig(1, 4).to_dict()
    assert (control["tokens"], control["seed"]) == (result.tokens, result.seed)
    assert control["gain"] == control["validation_loss"] - record["result"]["validation_loss"]
    assert record["result"]["corpora"]["forgetting"].keys() == {"before", "after"}
    assert load_model(config.output / "control").streams == 1
    for number in (result.validation_loss, control["validation_loss"], control["gain"]):
        assert f"{number:.5g}" in printed
    assert "forgetting" in printed
    closely = [row for row in result.history if "eval_loss" in row]
    assert {"streams/error_correlation", "streams/loss_factor", "streams/gain"} <= closely[-1].keys()
    details = probe_details(load_model(config.output), _watched(config), control=load_model(config.output / "control"))
    assert closely[-1]["streams/gain"] == pytest.approx(details.gain, abs=1e-4)
    assert closely[-1]["streams/loss_factor"] == pytest.approx(details.loss_factor, abs=1e-4)
    drawn = draw_probe(details, config.output.with_name("probe.svg"), config.output).read_text()
    assert "not in the log" not in drawn
    alone = train(replace(control_of(config), output=config.output.with_name("alone")))
    assert alone.validation_loss == control["validation_loss"]


def _watched(config: TrainConfig) -> torch.Tensor:
    """The text of a close look."""
    rows, length = CLOSELY
    return torch.as_tensor(prepare(config).validation[:rows]["input_ids"])[:, :length]


def test_a_run_whose_control_was_stopped_goes_on(config: TrainConfig) -> None:
    config = replace(config, control=True)
    train(control_of(config))  # and the run itself was never begun
    with pytest.raises(InputError, match="holds a run that was stopped; add --resume"):
        run_and_report(config)
    run_and_report(replace(config, resume=True))
    assert json.loads((config.output / "train.json").read_text())["control"]["gain"]


def test_a_run_without_a_control_prints_its_losses(config: TrainConfig, capsys) -> None:
    result = run_and_report(config)
    assert f"{result.validation_loss:.5g}" in capsys.readouterr().out
    assert "control" not in json.loads((config.output / "train.json").read_text())


def test_the_control_of_lora_streams_has_a_prefix(config: TrainConfig) -> None:
    only_lora = replace(config, streams=StreamsConfig(2, 0, diversify=("lora",)))
    assert control_of(only_lora).streams == StreamsConfig(1, 48)


def test_a_control_that_cannot_be_is_refused_before_any_work(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is the control itself"):
        run_and_report(replace(config, control=True, streams=StreamsConfig(1)))
    train(config)
    with pytest.raises(InputError, match="has streams already"):
        run_and_report(replace(config, control=True, model=str(config.output), output=tmp_path / "more"))
    assert not (tmp_path / "more").exists()
