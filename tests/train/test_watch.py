"""What the loggers are told of the streams, and the two alarms."""

import itertools
import math
from pathlib import Path

import pytest
import torch

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.probe import probe_streams
from parscale.probe_details import probe_details
from parscale.train.data import PackedText
from parscale.train.trainer import train
from parscale.train.watch import StreamWatch, as_logs, details_as_logs
from tests.small import VOCABULARY, build, with_streams
from tests.train.conftest import run


def _ids() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 9))


def test_it_tells_what_the_probe_sees() -> None:
    model, control, ids = with_streams(build(), streams=3), build(), _ids()
    seen = probe_streams(model, ids, control=control)
    watched = StreamWatch(ids, control).look(model)
    assert watched == seen
    logs = as_logs(seen)
    assert [logs[f"streams/weight_{i}"] for i in range(3)] == seen.weights
    assert [logs[f"streams/loss_{i}"] for i in range(3)] == seen.stream_losses
    assert logs["streams/cosine"] == seen.cosine
    assert logs["streams/error_correlation"] == seen.error_correlation
    assert math.exp(logs["streams/entropy"]) == pytest.approx(logs["streams/effective"])
    assert [logs[f"streams/cosine_layer_{i}"] for i in range(len(seen.layer_cosine))] == seen.layer_cosine
    assert StreamWatch(ids).look(build()) is None


def test_a_close_look_tells_all_that_a_probe_does() -> None:
    model, control, ids = with_streams(build(), streams=3), build(), _ids()
    watch = StreamWatch(ids, control)
    seen = probe_details(model, ids, control=control)
    assert watch.look_closely(model) == seen
    logs = details_as_logs(seen)
    assert [logs[f"streams/loss_without_{i}"] for i in range(3)] == seen.loss_without
    assert [logs[f"streams/gradient_{i}"] for i in range(3)] == seen.gradient_share
    layers = range(len(seen.spectrum_streams))
    assert [logs[f"streams/effective_layer_{i}"] for i in layers] == seen.spectrum_streams
    attention = torch.tensor(seen.prefix_attention)  # (layer, stream)
    of_streams = torch.tensor([logs[f"streams/prefix_attention_{i}"] for i in range(3)])
    of_layers = torch.tensor([logs[f"streams/prefix_attention_layer_{i}"] for i in layers])
    torch.testing.assert_close(of_streams, attention.mean(0))
    torch.testing.assert_close(of_layers, attention.mean(1))
    assert (logs["streams/loss_factor"], logs["streams/gain"]) == (seen.loss_factor, seen.gain)
    assert StreamWatch(ids).look_closely(build()) is None


def test_streams_that_are_one_raise_the_alarm_once() -> None:
    model, ids = with_streams(build(), streams=2), _ids()
    for name, parameter in model.named_parameters():
        if "prefix" in name:
            parameter.data.copy_(parameter.data[:1].expand_as(parameter))
    watch = StreamWatch(ids)
    seen = watch.look(model)
    assert seen is not None
    assert as_logs(seen)["streams/collapsed"] == 1
    assert not watch.alarms(seen, 30), "streams that have just begun are alike"
    (alarm,) = watch.alarms(seen, 40)
    assert alarm.startswith("alarm at step 40: stream collapse (cosine 1.000): P streams are no better than one")
    assert not watch.alarms(seen, 50)


def test_one_stream_with_all_the_weight_raises_the_alarm() -> None:
    model = with_streams(build(), streams=2, smoothing=0.01)
    head = model.base_model.aggregate_layer
    head[2].weight.data.zero_()
    head[2].bias.data.copy_(torch.tensor([9.0, 0.0]))
    watch = StreamWatch(_ids())
    seen = watch.look(model)
    assert seen is not None
    assert as_logs(seen)["streams/monoculture"] == 1
    watch.alarms(seen, 1)
    assert any("weight monoculture" in alarm for alarm in watch.alarms(seen, 2))


def test_a_logger_that_is_not_there_is_told_before_any_work(base: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("parscale.train.trainer.find_spec", lambda name: None)
    config = run("frozen", tmp_path / "out", model=str(base), streams=StreamsConfig(2, 4), report_to="wandb")
    with pytest.raises(InputError, match="report_to='wandb' needs a package: pip install wandb"):
        train(config)
    assert not (tmp_path / "out").exists()


def test_a_run_writes_event_files_and_the_alarm(base: Path, text: PackedText, tmp_path: Path, capsys) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard")
    output = tmp_path / "out"
    config = run("frozen", output, model=str(base), streams=StreamsConfig(2, 4), report_to="tensorboard")
    result = train(config, data=text)
    (folder,) = (output / "runs").iterdir()
    found = events.EventAccumulator(str(folder)).Reload()
    scalars = found.Tags()["scalars"]
    for name in ("weight_0", "weight_1", "effective", "entropy", "cosine", "collapsed", "monoculture"):
        assert f"train/streams/{name}" in scalars
    assert {"train/gradients/head", "train/gradients/streams", "train/skipped_steps", "eval/loss"} <= set(scalars)
    logged = [event.value for event in found.Scalars("train/streams/cosine")]
    expected = [row["streams/cosine"] for row in result.history]
    assert logged[-len(expected) :] == pytest.approx(expected)
    seen = [row["streams/collapsed"] for row in result.history if "eval_loss" in row]
    lasting = any(a == b == 1 for a, b in itertools.pairwise(seen[1:]))  # the first is of before the first step
    assert capsys.readouterr().err.count("stream collapse") == lasting, "said once, however often it is seen"
