"""Files are checked: a damaged checkpoint is named and the one before taken, a damaged cache is made anew."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from parscale import InputError
from parscale.train.checkpoints import Checkpoints
from parscale.train.data import PackedText, load_text, train_tokenizer
from parscale.train.streaming import stream_text
from parscale.train.trainer import train
from parscale.utils.hashes import HASHES
from tests.ecosystem import disk_children
from tests.ecosystem.disk import DAMAGES, damage
from tests.small import build
from tests.train import processes
from tests.train.children import run_of, train_until

CHECKPOINT = (
    "progress.json", "rng-0.json", "run.json", HASHES, "shard-00001-model-00001-of-00001.safetensors",
    "trainer_state.json",
)  # fmt: skip
STREAMED = ("documents.json", HASHES, "train.int32", "validation.int32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text, a model, a run of it that ended, and one killed in its eleventh step, with checkpoints at 6 and 9."""
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "text").mkdir()
    for number in range(40):
        (folder / "text" / f"{number}.txt").write_text(f"Document {number}: " + f"word{number * 7 % 97} " * 9)
    tokenizer = train_tokenizer(["some text"], 300)
    build("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train(config_of(folder, "whole"))
    assert processes.run(train_until, config_of(folder, "out"), 11) == [-signal.SIGKILL]
    return folder


def config_of(folder: Path, output: str, **changes: Any) -> Any:
    return run_of(folder / output, folder / "text", model=str(folder / "base"), **changes)


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def stopped(folder: Path, tmp_path: Path) -> Path:
    """A copy of the killed run's output."""
    return shutil.copytree(folder / "out", tmp_path / "out")


@pytest.fixture
def resume(stopped: Path) -> Callable[[], Path | None]:
    run = json.loads((stopped / "checkpoint-9" / "run.json").read_text())
    return Checkpoints(stopped, {name: value for name, value in run.items() if name != "hashes"}).resume


def test_the_files_of_a_checkpoint_are_those_that_are_damaged_here(stopped: Path, resume: Any) -> None:
    assert sorted(file.name for file in (stopped / "checkpoint-9").iterdir()) == sorted(CHECKPOINT)
    assert resume() == stopped / "checkpoint-9"


@pytest.mark.parametrize("kind", list(DAMAGES))
@pytest.mark.parametrize("file", CHECKPOINT)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(file, kind, stopped, resume, capsys) -> None:
    damage(stopped / "checkpoint-9" / file, kind)
    assert resume() == stopped / "checkpoint-6"
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{stopped / 'checkpoint-9'} is damaged (" in told
    assert file in told
    assert "going on from checkpoint-6" in told
    assert sorted(path.name for path in stopped.glob("checkpoint*")) == ["checkpoint-6", "checkpoint-9.damaged"]
    assert resume() == stopped / "checkpoint-6", "it is told once"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["other", "one too many", "a folder", "a link", "a pipe", "no folder", "empty folder"])
def test_a_checkpoint_of_other_files_is_damaged(kind: str, stopped: Path, resume: Any, capsys: Any) -> None:
    newest, file = stopped / "checkpoint-9", stopped / "checkpoint-9" / "progress.json"
    if kind == "other":
        shutil.copy(stopped / "checkpoint-6" / file.name, file)
    elif kind == "one too many":
        (newest / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"")
    elif kind in ("no folder", "empty folder"):
        shutil.rmtree(newest)
        newest.mkdir() if kind == "empty folder" else newest.write_bytes(b"")
    else:
        file.unlink()
        make = {"a folder": Path.mkdir, "a link": lambda file: file.symlink_to("/dev/zero"), "a pipe": os.mkfifo}
        make[kind](file)
    assert resume() == stopped / "checkpoint-6"
    assert "checkpoint-9 is damaged" in capsys.readouterr().err


def test_two_damaged_checkpoints_are_both_named(stopped: Path, resume: Any, capsys: Any) -> None:
    """Where none is whole nothing is begun anew unasked, and nothing is moved."""
    shutil.copytree(stopped / "checkpoint-6", stopped / "checkpoint-3")
    for step in (6, 9):
        damage(stopped / f"checkpoint-{step}" / "rng-0.json", "one bit")
    assert resume() == stopped / "checkpoint-3"
    assert capsys.readouterr().err.count("is damaged (rng-0.json") == 2
    damage(stopped / "checkpoint-3" / "rng-0.json", "one bit")
    with pytest.raises(InputError, match=r"no checkpoint is whole: checkpoint-3 \(rng-0\.json is not"):
        resume()
    assert (stopped / "checkpoint-3").is_dir()


def test_a_checkpoint_from_before_there_were_hashes_is_taken(stopped: Path, resume: Any, capsys: Any) -> None:
    run = stopped / "checkpoint-9" / "run.json"
    run.write_text(json.dumps({k: v for k, v in json.loads(run.read_text()).items() if k != "hashes"}))
    (stopped / "checkpoint-9" / HASHES).unlink()
    assert resume() == stopped / "checkpoint-9"
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_from_the_one_before_to_the_same_bits(folder: Path, stopped: Path, tmp_path: Path) -> None:
    damage(stopped / "checkpoint-9" / CHECKPOINT[4], "zeros")
    train(config_of(folder, str(stopped), resume=True))
    assert weights(stopped) == weights(folder / "whole")
    assert sorted(path.name for path in stopped.glob("checkpoint*")) == [
        "checkpoint-6", "checkpoint-9", "checkpoint-9.damaged",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(DAMAGES))
@pytest.mark.parametrize("file", CHECKPOINT)
def test_whatever_is_damaged_a_run_ends_in_the_same_bits(file: str, kind: str, folder: Path, stopped: Path) -> None:
    damage(stopped / "checkpoint-9" / file, kind)
    train(config_of(folder, str(stopped), resume=True))
    assert weights(stopped) == weights(folder / "whole")


def entry(cache: Path) -> Path:
    (found,) = (cache / "tokens").iterdir()
    return found


def same(one: PackedText, other: PackedText) -> bool:
    facts = [
        (text.fingerprint, text.train["input_ids"][:].tolist(), text.validation["input_ids"][:].tolist(),
         text.train_documents, text.validation_documents, text.tokenizer.get_vocab(), text.overlap)
        for text in (one, other)
    ]  # fmt: skip
    return facts[0] == facts[1]


@pytest.mark.parametrize("kind", list(DAMAGES))
@pytest.mark.parametrize(("make", "file"), [(load_text, ""), *((stream_text, file) for file in STREAMED)])
def test_a_damaged_cache_is_told_and_made_anew(make, file, kind, folder, tmp_path, capsys) -> None:
    def load() -> PackedText:
        return make(folder / "text", block_size=16, vocab_size=300, cache_dir=tmp_path / "cache")

    whole = load()
    damaged = entry(tmp_path / "cache")
    if make is stream_text:
        assert sorted(path.name for path in damaged.iterdir()) == sorted(STREAMED)
    damage(damaged / file, kind)
    capsys.readouterr()
    assert same(load(), whole)
    assert (f"cache entry {damaged} is damaged" in capsys.readouterr().err) == (file != "" or kind != "absent")
    assert same(load(), whole), "what was made anew is whole"
    assert capsys.readouterr().err == ""
    assert entry(tmp_path / "cache") == damaged


@pytest.mark.parametrize("kind", ["a file", "an empty folder", "a dead link", "without hashes"])
def test_an_entry_of_another_kind_is_made_anew(kind: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    def load() -> PackedText:
        return stream_text(folder / "text", block_size=16, vocab_size=300, cache_dir=tmp_path / "cache")

    whole = load()
    damaged = entry(tmp_path / "cache")
    if kind == "without hashes":
        (damaged / HASHES).unlink()
    else:
        shutil.rmtree(damaged)
        make = {"a file": Path.touch, "an empty folder": Path.mkdir, "a dead link": lambda path: path.symlink_to("no")}
        make[kind](damaged)
    capsys.readouterr()
    assert same(load(), whole)
    assert f"cache entry {damaged} is damaged" in capsys.readouterr().err
    assert entry(tmp_path / "cache").is_dir()


def test_several_processes_at_once_mend_a_cache(folder: Path, tmp_path: Path) -> None:
    options = {"block_size": 16, "vocab_size": 300, "cache_dir": tmp_path / "cache"}
    stream_text(folder / "text", **options)
    damage(entry(tmp_path / "cache") / "train.int32", "zeros")
    whole = stream_text(folder / "text", **(options | {"cache_dir": tmp_path / "other"}))
    codes = processes.run(
        disk_children.load_and_compare, folder / "text", options, whole.train["input_ids"][:], processes=3
    )
    assert codes == [0, 0, 0]
    assert [file.name for file in (tmp_path / "cache" / "tokens").iterdir()] == [entry(tmp_path / "other").name]
