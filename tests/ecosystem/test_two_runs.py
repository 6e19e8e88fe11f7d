"""Two runs in one folder: the second is refused at once and told who is there; a dead process blocks nobody."""

import json
import multiprocessing
import os
import select
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from parscale import InputError
from parscale.cli import main
from parscale.experiments.demo import run_demo
from parscale.experiments.pilot import run_pilot
from parscale.experiments.sweep import _append, read_rows
from parscale.export.run import export_model
from parscale.merge_folder import merge_folder
from parscale.train import report
from parscale.train.trainer import train
from parscale.utils.lock import LOCK, hold
from tests.ecosystem import disk_children
from tests.train import processes
from tests.train.children import run_of
from tests.train.conftest import run

_CONTEXT = multiprocessing.get_context("forkserver")

VERBS: dict[str, Callable[[Path], Any]] = {
    "train": lambda out: train(run("retrofit", out, model="none")),
    "resume": lambda out: train(run("retrofit", out, model="none", resume=True)),
    "verb": lambda out: report.run(run("retrofit", out, model="none")),
    "control": lambda out: report.run(run("retrofit", out, model="none", control=True, resume=True)),
    "pilot": lambda out: run_pilot("none", data=["none"], out=out),
    "demo": lambda out: run_demo(out),
    "export": lambda out: export_model("none", out, engine="onnx"),
    "merge-first": lambda out: merge_folder("none", out),
}


@pytest.fixture
def holder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, int | None]]:
    """A process that holds `out`, and a fork of it if asked for."""
    ours, theirs = _CONTEXT.Pipe()
    fork = getattr(request, "param", False)
    process = _CONTEXT.Process(target=disk_children.hold_until_killed, args=(tmp_path / "out", theirs, fork))
    process.start()
    pids = ours.recv()
    yield pids
    process.kill()
    process.join()
    if pids[1]:
        os.kill(pids[1], signal.SIGKILL)


@pytest.mark.parametrize("verb", list(VERBS))
def test_whoever_comes_second_is_refused_at_once(verb: str, holder: Any, tmp_path: Path) -> None:
    """Before anything is read: the models and texts named here do not exist."""
    for _ in range(2):
        with pytest.raises(InputError, match=f"out' is in use by process {holder[0]} on "):
            VERBS[verb](tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == [LOCK]


def test_the_command_line_says_so_in_one_line(holder: Any, tmp_path: Path, capsys: Any) -> None:
    assert main(["train", "retrofit", "--model", "none", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"in use by process {holder[0]}" in told


@pytest.mark.parametrize("holder", [False, True], indirect=True, ids=["alone", "with a fork that lives on"])
def test_a_dead_process_blocks_nobody(holder: Any, tmp_path: Path) -> None:
    os.kill(holder[0], signal.SIGKILL)
    _wait_until_dead(holder[0])
    assert (tmp_path / "out" / LOCK).exists()
    with hold(tmp_path / "out"):
        assert (tmp_path / "out" / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "out" / LOCK).exists()


def _wait_until_dead(pid: int) -> None:
    handle = os.pidfd_open(pid)
    try:
        select.select([handle], [], [], 60)
    finally:
        os.close(handle)


def test_a_fork_takes_nothing_away(tmp_path: Path) -> None:
    assert processes.run(disk_children.fork_within, tmp_path / "out") == [0]


def test_one_thread_holds_a_folder_and_may_hold_it_again(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def enter() -> str:
        try:
            with hold(out):
                return "held"
        except InputError as refused:
            return str(refused)

    with ThreadPoolExecutor(1) as pool, hold(out), hold(tmp_path / "other"):
        with hold(out), hold(Path(os.path.relpath(out))):
            assert f"in use by process {os.getpid()}" in pool.submit(enter).result()
        assert "in use" in pool.submit(enter).result(), "the inner block does not give it back"
        out.joinpath("file").touch()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(enter).result() == "held"


@pytest.mark.parametrize("there", [False, True])
def test_an_empty_folder_is_removed_where_it_was_made(there: bool, tmp_path: Path) -> None:
    if there:
        (tmp_path / "out").mkdir()
    with pytest.raises(KeyError), hold(tmp_path / "out"):
        raise KeyError
    assert [file.name for file in tmp_path.rglob("*")] == ["out"] * there


@pytest.mark.parametrize("planted", ["link", "folder"])
def test_a_lock_that_is_none_is_refused(planted: str, tmp_path: Path) -> None:
    """A link is not followed: what it names would be written over."""
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("precious")
    if planted == "link":
        (tmp_path / "out" / LOCK).symlink_to(tmp_path / "precious")
    else:
        (tmp_path / "out" / LOCK).mkdir()
    with pytest.raises(InputError, match=f"cannot write {LOCK} there"), hold(tmp_path / "out"):
        raise AssertionError
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def none(*_: Any) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    with hold(tmp_path / "out"):
        pass
    assert "cannot be locked (Operation not supported); start no second run there" in capsys.readouterr().err


def test_of_two_runs_at_once_one_is_whole_and_one_refused(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(Path(json.__file__).read_text()[:3000]))
    config = run_of(tmp_path / "out", text, model="nano", vocab_size=300, tokens=3 * 4 * 16, save_every=None)
    configs = [replace(config, stage="pretrain", seed=seed) for seed in (0, 7)]
    begin, pipes, started = _CONTEXT.Barrier(2), [], []
    for one in configs:
        ours, theirs = _CONTEXT.Pipe()
        pipes.append(ours)
        started.append(_CONTEXT.Process(target=disk_children.train_or_be_refused, args=(one, begin, theirs)))
        started[-1].start()
    said = [pipe.recv() for pipe in pipes]
    for process in started:
        process.join()
    (winner,) = (n for n, one in enumerate(said) if isinstance(one, int))
    assert f"in use by process {said[winner]} on " in said[1 - winner]
    alone = replace(configs[winner], output=tmp_path / "alone")
    train(alone)
    ours, theirs = ((one.output / "model.safetensors").read_bytes() for one in (config, alone))
    assert ours == theirs


def test_rows_that_two_sweeps_append_are_all_there(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [[{"key": f"{writer} {n}", "scale": "s", "text": "x" * 50_000} for n in range(50)] for writer in range(4)]

    def append(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            _append(file, row)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(append, rows))
    assert {row["key"] for row in read_rows(file)} == {row["key"] for some in rows for row in some}
