"""Runs that are killed, starved, told to stop or fed with NaN, against the run that was left alone: to the last bit."""

import json
import random
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from parscale.errors import InputError
from parscale.load import load_tokenizer
from parscale.train.checkpoints import Checkpoints
from parscale.train.data import PackedText
from parscale.train.faults import FaultTolerance
from parscale.train.trainer import StreamsTrainer, train
from parscale.utils.hashes import write_hashes
from tests.small import VOCABULARY, build
from tests.train import processes
from tests.train.children import (
    run_of,
    train_on_a_full_disk,
    train_until,
    train_until_told_to_stop,
    train_with_equal_losses,
)


@pytest.fixture(scope="module")
def noisy(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model with dropout, so that a random generator that is not put back changes the weights."""
    folder = tmp_path_factory.mktemp("noisy") / "noisy"
    model = AutoModelForCausalLM.from_pretrained(base, attention_dropout=0.1)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of which twelve steps see more than one pass."""
    file = tmp_path_factory.mktemp("short") / "text.txt"
    file.write_text("".join(Path(json.__file__).read_text()[:1500]))
    return file


@pytest.fixture(scope="module")
def whole(noisy: Path, short: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of the run that nothing happened to."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(run_of(output, short, model=str(noisy)))
    return (output / "model.safetensors").read_bytes()


def _steps(output: Path) -> list[str]:
    return sorted(path.name for path in output.iterdir() if path.name.startswith((".", "checkpoint")))


def _go_on(output: Path, short: Path, noisy: Path, **changes: Any) -> bytes:
    train(run_of(output, short, model=str(noisy), resume=True, **changes))
    assert not list(output.glob(".*")), "what was half-written is gone"
    return (output / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_to_the_same_bits(noisy: Path, short: Path, whole: bytes, tmp_path: Path) -> None:
    output = tmp_path / "out"
    config = run_of(output, short, model=str(noisy), resume=True)
    assert processes.run(train_until, config, 6) == [-signal.SIGKILL]
    assert _steps(output) == ["checkpoint-3"]
    assert processes.run(train_until, config, 2, "save") == [-signal.SIGKILL]  # of this process: at step 9
    assert _steps(output) == [".checkpoint.partial", "checkpoint-3", "checkpoint-6"]
    assert _go_on(output, short, noisy) == whole
    assert _steps(output) == ["checkpoint-6", "checkpoint-9"], "the newest two are kept"


@pytest.mark.slow
def test_twenty_kills(noisy: Path, short: Path, whole: bytes, tmp_path: Path) -> None:
    draw, kills, run = random.Random(0), 0, 0
    while kills < 20:
        output, every = tmp_path / str(run), draw.choice([1, 2, 5])
        config = run_of(output, short, model=str(noisy), resume=True, save_every=every)
        exits = [-signal.SIGKILL]
        while exits == [-signal.SIGKILL] and kills < 20:
            exits = processes.run(train_until, config, draw.randint(1, 7), draw.choice(["step", "step", "save"]))
            kills += exits == [-signal.SIGKILL]
        if exits == [-signal.SIGKILL]:
            processes.run(train_until, config)
        assert (output / "model.safetensors").read_bytes() == whole
        run += 1


def test_the_optimizer_is_read_back(noisy: Path, short: Path, whole: bytes, tmp_path: Path, monkeypatch) -> None:
    """The proof that the comparison sees anything: without one part of the state, other weights come out."""
    output = tmp_path / "out"
    processes.run(train_until, run_of(output, short, model=str(noisy)), 8)
    monkeypatch.setattr("parscale.train.faults.load_random_state", lambda folder: None)
    assert _go_on(output, short, noisy) != whole


def test_sigterm_saves_and_exits_with_0(noisy, short, whole, tmp_path) -> None:
    output, told = tmp_path / "out", tmp_path / "told"
    config = run_of(output, short, model=str(noisy), save_every=None)
    assert processes.run(train_until_told_to_stop, config, 5, told) == [0]
    assert "after step 5 of 12" in told.read_text()
    assert "resume with: parscale train retrofit --output 'my run' --resume" in told.read_text()
    assert _steps(output) == ["checkpoint-5"]
    assert _go_on(output, short, noisy) == whole


def test_sigterm_in_the_step_of_an_evaluation_loses_none(noisy: Path, short: Path, tmp_path: Path) -> None:
    """A run that goes on has measured what one left alone has, and its running mean is the same."""
    settings: dict[str, Any] = {"model": str(noisy), "save_every": None, "evaluations": 3}
    alone = train(run_of(tmp_path / "alone", short, **settings))
    config = run_of(tmp_path / "out", short, **settings, resume=True)
    assert processes.run(train_until_told_to_stop, config, 4, tmp_path / "told") == [0]
    ours, theirs = (
        [(row["step"], row["eval_loss"], row["eval_loss_smooth"]) for row in result.history if "eval_loss" in row]
        for result in (train(config), alone)
    )
    assert [step for step, _, _ in theirs] == [4, 8, 12]
    assert ours == theirs


def test_a_full_disk_leaves_the_last_checkpoint_whole(noisy, short, whole, tmp_path) -> None:
    output, error = tmp_path / "out", tmp_path / "error"
    assert processes.run(train_on_a_full_disk, run_of(output, short, model=str(noisy)), 5, error) == [2]
    told = error.read_text()
    assert "\n" not in told
    assert "cannot write checkpoint-6" in told
    assert "checkpoint-3 is whole" in told
    assert _steps(output) == ["checkpoint-3"]
    assert _go_on(output, short, noisy) == whole


def test_a_gradient_that_is_not_finite_is_passed_over(noisy, short, tmp_path, monkeypatch) -> None:
    _in_step(monkeypatch, 5, lambda trainer: _spoil(trainer, "streams"), after=True)
    seen = {}

    def weights(trainer: StreamsTrainer) -> None:
        seen[trainer.state.global_step] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}

    for step in (5, 6):
        _in_step(monkeypatch, step, weights)
    result = train(run_of(tmp_path / "out", short, model=str(noisy), save_every=None))
    assert result.skipped_steps == 1
    assert result.steps == 12
    assert all(torch.equal(seen[4][name], seen[5][name]) for name in seen[4]), "the step changed nothing"
    assert [row["skipped_steps"] for row in result.history if "loss" in row][3:6] == [0, 1, 1]
    assert all(torch.isfinite(p).all() for p in AutoModelForCausalLM.from_pretrained(tmp_path / "out").parameters())


def test_a_loss_that_is_not_finite_is_passed_over(noisy, short, tmp_path, monkeypatch) -> None:
    original, calls = StreamsTrainer.compute_loss, []

    def infinite_once(self: StreamsTrainer, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        loss = original(self, *args, **kwargs)
        training = not isinstance(loss, tuple)
        return loss + torch.inf if training and self.state.global_step == 4 else loss

    monkeypatch.setattr(StreamsTrainer, "compute_loss", infinite_once)
    assert train(run_of(tmp_path / "out", short, model=str(noisy), save_every=None)).skipped_steps == 1


def test_patience_is_not_forgotten(noisy, short, tmp_path) -> None:
    """Evaluations without a gain at steps 3 (the best to beat), 6 and 9: some before the run is stopped, one after."""
    patient = {"evaluations": 4, "patience": 2, "smooth_validation": 0.0, "save_every": None}
    config = run_of(tmp_path / "out", short, model=str(noisy), resume=True, **patient)
    assert processes.run(train_with_equal_losses, config, tmp_path / "steps", 7) == [0]
    assert _steps(tmp_path / "out") == ["checkpoint-7"]
    assert processes.run(train_with_equal_losses, config, tmp_path / "steps") == [0]
    assert (tmp_path / "steps").read_text() == "9"
    ended = replace(config, output=tmp_path / "ended")
    assert processes.run(train_with_equal_losses, ended, tmp_path / "steps", 9) == [0]
    assert (ended.output / "train.json").exists(), "told to stop in the step that was the last"


def test_many_in_a_row_stop_the_run(noisy, short, tmp_path, monkeypatch) -> None:
    output = tmp_path / "out"
    for step in (5, 6, 7):
        _in_step(monkeypatch, step, lambda trainer: _spoil(trainer, "streams"), after=True)
    with pytest.raises(InputError, match=r"gradient of streams was not finite in 3 steps in a row.*checkpoint-7"):
        train(run_of(output, short, model=str(noisy), save_every=None, max_skipped=3))
    monkeypatch.undo()
    train(run_of(output, short, model=str(noisy), save_every=None, resume=True))
    assert json.loads((output / "train.json").read_text())["result"]["skipped_steps"] == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model": "other"}, "model="),
        ({"learning_rate": 1e-4}, "learning_rate=0.003 instead of 0.0001"),
        ({"seed": 1}, "seed=0 instead of 1"),
        ({"batch_size": 8}, "sequences in a step=4 instead of 8"),
    ],
)
def test_a_folder_of_another_run_is_refused(changes, named, noisy, base, short, stopped: Path) -> None:
    if "model" in changes:
        changes = {"model": str(base)}
    with pytest.raises(InputError, match=named):
        train(run_of(stopped, short, **{"model": str(noisy), "resume": True} | changes))
    assert _steps(stopped) == ["checkpoint-3"]


def test_other_weights_under_the_same_name_are_refused(noisy, short, tmp_path) -> None:
    folder, output = tmp_path / "model", tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(noisy)
    load_tokenizer(noisy).save_pretrained(folder)
    model.save_pretrained(folder)
    processes.run(train_until, run_of(output, short, model=str(folder)), 5)
    model.lm_head.weight.data += 1
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="other weights than model="):
        train(run_of(output, short, model=str(folder), resume=True))


def test_checkpoints_are_not_written_over_unasked(stopped: Path, noisy, short) -> None:
    with pytest.raises(InputError, match="--resume"):
        train(run_of(stopped, short, model=str(noisy)))


def test_a_finished_run_is_not_trained_again(noisy, short, tmp_path, text: PackedText) -> None:
    config = run_of(tmp_path / "out", short, model=str(noisy), resume=True)
    first = train(config)
    weights = (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns
    assert train(config) == first
    assert train(replace(config, keep=7)) == first  # changes no weight
    assert (tmp_path / "out" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_finished_run_is_not_given_back_for_another(noisy, short, tmp_path) -> None:
    config = run_of(tmp_path / "out", short, model=str(noisy), resume=True)
    train(config)
    with pytest.raises(InputError, match=r"the end of another run, with weight_decay=0\.1 instead of 0\.2"):
        train(replace(config, weight_decay=0.2))
    with pytest.raises(InputError, match="sequences in a step=4 instead of 8"):
        train(replace(config, batch_size=8))
    (config.output / "train.json").write_text("{")
    with pytest.raises(InputError, match=r"train\.json cannot be read"):
        train(config)


def test_a_finished_run_of_other_text_or_weights_is_not_given_back(noisy, short, base, tmp_path) -> None:
    """The same settings, while what they name has changed."""
    text, model = tmp_path / "text.txt", tmp_path / "model"
    text.write_text(short.read_text())
    shutil.copytree(noisy, model)
    config = run_of(tmp_path / "out", text, model=str(model), resume=True)
    told = train(config)
    assert train(config) == told
    text.write_text(short.read_text() + "more")
    with pytest.raises(InputError, match=r"the end of another run, with another text than data="):
        train(config)
    text.write_text(short.read_text())
    weights = load_file(model / "model.safetensors")
    save_file({name: 2 * value for name, value in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"the end of another run, with other weights than model="):
        train(config)


def test_the_time_before_a_resume_counts(stopped: Path, noisy, short) -> None:
    progress = stopped / "checkpoint-3" / "progress.json"
    progress.write_text(json.dumps(json.loads(progress.read_text()) | {"seconds": 1e6}))
    write_hashes(progress.parent)
    assert train(run_of(stopped, short, model=str(noisy), resume=True)).seconds > 1e6


class PlainTrainer(FaultTolerance, Trainer):
    """Any Trainer, as docs/faults.md has it."""


def test_any_trainer_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def trained(output: Path) -> list[torch.Tensor]:
        torch.manual_seed(0)
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, VOCABULARY, (32, 8))]
        settings = {"max_steps": 8, "save_steps": 3, "per_device_train_batch_size": 4, "report_to": "none"}
        arguments = TrainingArguments(str(output), disable_tqdm=True, use_cpu=True, **settings)
        checkpoints = Checkpoints(output, run={"data": "random"})
        trainer = PlainTrainer(build("llama"), arguments, train_dataset=rows, checkpoints=checkpoints)
        newest = checkpoints.resume()
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)
        return list(trainer.model.parameters())

    whole = trained(tmp_path / "whole")
    (tmp_path / "stopped").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "stopped" / "checkpoint-3")
    for ours, theirs in zip(trained(tmp_path / "stopped"), whole, strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_holds_no_pickle(stopped: Path) -> None:
    assert {file.suffix for file in (stopped / "checkpoint-3").iterdir()} == {".safetensors", ".json"}


@pytest.fixture
def stopped(noisy: Path, short: Path, tmp_path: Path) -> Path:
    """The output of a run that was killed at step 5."""
    output = tmp_path / "stopped"
    processes.run(train_until, run_of(output, short, model=str(noisy)), 5)
    return output


def _in_step(monkeypatch: pytest.MonkeyPatch, step: int, action: Any, *, after: bool = False) -> None:
    """Let `action(trainer)` happen in a training step, counted from 1: before the forward or after the backward."""
    original = StreamsTrainer.training_step

    def with_action(self: StreamsTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        now = self.state.global_step == step - 1
        if now and not after:
            action(self)
        loss = original(self, *args, **kwargs)
        if now and after:
            action(self)
        return loss

    monkeypatch.setattr(StreamsTrainer, "training_step", with_action)


def _spoil(trainer: StreamsTrainer, group: str) -> None:
    (chosen,) = (g for g in trainer.optimizer.param_groups if g["name"] == group)
    chosen["params"][0].grad.view(-1)[0] = torch.nan
