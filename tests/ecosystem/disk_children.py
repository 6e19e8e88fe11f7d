"""What the tests of kills and locks run in processes of their own."""

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from parscale import InputError, save_streams
from parscale.train import report
from parscale.train.config import TrainConfig
from parscale.train.streaming import stream_text
from parscale.utils.files import add_files, finish, new_folder, remove_unfinished
from parscale.utils.lock import LOCK, hold
from tests import small
from tests.ecosystem.disk import in_fork, watch

FILES = ("a.json", "b.json", "last.json")


def run_and_die(config: TrainConfig, kill_before: int | None, log: Path) -> None:
    """`parscale train`; dies before a file operation in its output, or leaves all of them in `log`."""
    seen = watch(config.output, kill_before)
    report.run(config)
    log.write_text(json.dumps(seen))


def _fill(folder: Path, text: str) -> None:
    for name in FILES:
        (folder / name).write_text(text)


def _add(folder: Path, text: str) -> None:
    with hold(folder):
        finish(folder, FILES[-1])
        remove_unfinished(folder)
        with add_files(folder, FILES[-1]) as scratch:
            _fill(scratch, text)


def _new(folder: Path, text: str) -> None:
    with new_folder(folder) as scratch:
        _fill(scratch, text)


def kill_everywhere(folder: Path, writer: str) -> None:
    """Write three files, over three others or into a new folder, and die before each file operation in turn. Once who
    comes next has looked, all are as before or all are new, and nothing else is there."""
    write: Callable[[Path, str], None] = {"add": _add, "new": _new}[writer]
    new = dict.fromkeys(FILES, b"new")
    old = dict.fromkeys(FILES, b"old") if writer == "add" else {}
    code, found = -signal.SIGKILL, []
    while code == -signal.SIGKILL:
        out = folder / str(len(found))
        if old:
            _add(out, "old")
        code = in_fork(partial(_write_and_die, write, out, "new", len(found) + 1))
        with hold(out):
            finish(out, FILES[-1])
            remove_unfinished(out)
        found.append(_content(out))
    assert code == 0
    assert all(content in (old, new) for content in found), found
    assert len(found) > 8, "operations were seen"
    assert old in found
    assert new in found[:-1], "killed behind the rename that commits"


def kill_a_save_of_streams(folder: Path) -> None:
    """Save streams over others of the same shapes, and die before each file operation in turn: one or the other are
    there, or a folder that is refused."""
    models = [small.with_streams(small.build(kind)) for kind in ("qwen2", "llama")]
    pairs = []
    for model in models:
        save_streams(model, folder / "whole")
        pairs.append(_content(folder / "whole"))
    assert pairs[0] != pairs[1]
    code, found = -signal.SIGKILL, []
    while code == -signal.SIGKILL:
        out = folder / str(len(found))
        save_streams(models[0], out)
        code = in_fork(partial(_write_and_die, lambda out, _: save_streams(models[1], out), out, "", len(found) + 1))
        found.append(_content(out))
    assert code == 0
    assert found[-1] == pairs[1]
    assert all(content in pairs for content in found if "streams.json" in content)
    assert len(found) > 5, "operations were seen"


def _write_and_die(write: Callable[[Path, str], None], out: Path, text: str, number: int) -> None:
    watch(out, number)
    write(out, text)


def _content(folder: Path) -> dict[str, bytes]:
    """Of every entry that is not hidden; folders have none."""
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.name: file.read_bytes() for file in found if not file.name.startswith(".") or file.is_dir()}


def hold_until_killed(folder: Path, ready: Any, fork: bool) -> None:
    """Hold a folder for ever. A fork of this process may live on when it is killed. `ready` gets their numbers."""
    with hold(folder):
        child = os.fork() if fork else None
        if child == 0:
            signal.pause()
        ready.send((os.getpid(), child))
        signal.pause()


def fork_within(folder: Path) -> None:
    """A fork that ends in the middle of the block takes nothing away from the process that holds the folder."""
    with hold(folder):
        pid = os.fork()
        if pid == 0:
            raise SystemExit(0)  # through the block's end
        os.waitpid(pid, 0)
        assert (folder / LOCK).exists()
    assert not folder.exists() or not any(folder.iterdir())


def train_or_be_refused(config: TrainConfig, begin: Any, result: Any) -> None:
    """Train at the same moment as another; who is refused says why, and who is not, its number."""
    begin.wait()
    try:
        report.run(config)
        result.send(os.getpid())
    except InputError as refused:
        result.send(str(refused))


def load_and_compare(text: Path, options: dict[str, Any], expected: Any) -> None:
    """Read a text through a cache that others read too."""
    assert (stream_text(text, **options).train["input_ids"][:] == expected).all()
