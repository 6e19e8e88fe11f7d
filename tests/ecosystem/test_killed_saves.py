"""A run that is killed at a file operation goes on to the same bits, also in the middle of its last save."""

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parscale.load import load_model
from parscale.train import report
from parscale.train.config import TrainConfig
from parscale.train.data import train_tokenizer
from parscale.utils.files import COMMITTED, UNFINISHED
from tests.ecosystem import disk_children
from tests.small import build
from tests.train import processes
from tests.train.children import run_of

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for the old name

KINDS: dict[str, dict[str, Any]] = {
    "model": {},
    "adapters": {"peft": "lora", "peft_rank": 2},
    "with control": {"control": True},
    "streamed": {"streaming": True},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Document {number}: " + f"word{number * 7 % 97} " * 9)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    tokenizer = train_tokenizer(["some text"], 300)
    build("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Runs:
    """One kind of run: its operations on files and its final weights, when nothing happens to it."""

    def __init__(self, kind: str, base: Path, text: Path, folder: Path) -> None:
        self.config = run_of(folder / "alone", text, model=str(base), tokens=4 * 4 * 16, save_every=1, **KINDS[kind])
        log = folder / "log"
        assert processes.run(disk_children.run_and_die, self.config, None, log) == [0]
        self.events = [tuple(event) for event in json.loads(log.read_text())]
        self.weights = weights(self.config)

    def killed_before(self, number: int, output: Path) -> None:
        """Kill a run before its operation of that number, counted from 1; go on, and compare."""
        config = replace(self.config, output=output)
        code = processes.run(disk_children.run_and_die, config, number, output.with_name("log"))
        assert code == [-signal.SIGKILL], self.events[number - 1]
        report.run(replace(config, resume=True))
        assert weights(config) == self.weights, self.events[number - 1]
        left = [file.name for file in [*output.glob(".*"), *output.glob("*/.*"), *output.glob("**/*.lock")]]
        assert left == [], self.events[number - 1]


def weights(config: TrainConfig) -> list[bytes]:
    """Of the model and its control, whole or as adapters."""
    found = [file for pattern in ("*.safetensors", "control/*.safetensors") for file in config.output.glob(pattern)]
    assert found
    return [file.read_bytes() for file in sorted(found)]


@pytest.fixture(scope="module")
def runs(base: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs("model", base, text, tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize("last", ["before the commit", "first move", "the record's move", "the very last"])
def test_a_kill_in_the_last_save(last: str, runs: Runs, tmp_path: Path) -> None:
    commit = runs.events.index(("os.rename", UNFINISHED))
    moves = [number for number in range(commit + 1, len(runs.events)) if runs.events[number][0] == "os.rename"]
    record = runs.events.index(("os.rename", "train.json"))
    assert record == moves[-1]
    done = runs.events.index(("os.rmdir", COMMITTED))
    points = {"before the commit": commit, "first move": moves[0], "the record's move": record, "the very last": done}
    runs.killed_before(points[last] + 1, tmp_path / "out")


def test_a_kill_while_the_control_is_recorded(base: Path, text: Path, tmp_path: Path) -> None:
    """The run has ended by then, and goes on with nothing: what was half-written is cleared all the same."""
    runs = Runs("with control", base, text, tmp_path)
    renames = [number for number, (operation, _) in enumerate(runs.events) if operation == "os.rename"]
    assert runs.events[renames[-1]][1].startswith(".train.")
    runs.killed_before(renames[-1] + 1, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_kill_at_every_fourth_operation_and_the_last_twenty(
    kind: str, base: Path, text: Path, tmp_path: Path
) -> None:
    runs = Runs(kind, base, text, tmp_path)
    count = len(runs.events)
    for number in range(1, count + 1):
        if number % 4 == 0 or number > count - 20:
            (tmp_path / str(number)).mkdir()
            runs.killed_before(number, tmp_path / str(number) / "out")


def test_a_run_cut_off_in_its_last_save_is_not_begun_anew_unasked(runs: Runs, tmp_path: Path) -> None:
    """Whoever comes finishes the save; a folder with a model in it is refused then."""
    config = replace(runs.config, output=tmp_path / "out")
    first_move = runs.events.index(("os.rename", UNFINISHED)) + 2
    processes.run(disk_children.run_and_die, config, first_move, tmp_path / "log")
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        report.run(config)
    assert weights(config) == runs.weights
    load_model(config.output)


@pytest.mark.parametrize("writer", ["add", "new"])
def test_files_written_together_are_all_there_or_none(writer: str, tmp_path: Path) -> None:
    assert processes.run(disk_children.kill_everywhere, tmp_path, writer) == [0]


def test_saved_streams_are_whole_or_refused(tmp_path: Path) -> None:
    assert processes.run(disk_children.kill_a_save_of_streams, tmp_path) == [0]
    folder = tmp_path / "whole"
    (folder / "streams.json").unlink()
    with pytest.raises(ValueError, match="streams"):
        load_model(folder)
