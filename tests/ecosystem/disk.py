"""Processes that are killed at a file operation, files that are damaged, and disks without room."""

import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "os.truncate")
Seen = list[tuple[str, str]]


def watch(folder: Path, kill_before: int | None = None) -> Seen:
    """Every file operation of this process in `folder` from now on, as (event, name); it dies before one of them."""
    seen: Seen = []

    def hook(event: str, args: tuple) -> None:
        if event not in EVENTS or not args or not isinstance(args[0], str | os.PathLike):
            return
        path = Path(os.fspath(args[0]))
        if path == folder or folder in path.parents:
            seen.append((event, path.name))
            if len(seen) == kill_before:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return seen


def in_fork(action: Callable[[], None]) -> int:
    """What `action` in a process of its own ends with: 0, 1 for any error, or less for a signal."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _flipped(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "absent": lambda whole: None,
    "empty": lambda whole: b"",
    "half": lambda whole: whole[: len(whole) // 2],
    "one byte less": lambda whole: whole[:-1],
    "one byte more": lambda whole: whole + b"\n",
    "one bit": lambda whole: _flipped(whole, len(whole) // 2),
    "zeros": lambda whole: bytes(len(whole)),
    "ones": lambda whole: b"\xff" * (len(whole) // 4 * 4),
    "other": lambda whole: bytes(range(256)) * 20,
}
"""What happens to a file: its content before, to that after. None removes it."""


def damage(file: Path, kind: str) -> None:
    content = DAMAGES[kind](file.read_bytes())
    file.unlink()
    if content is not None:
        file.write_bytes(content)


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """No file may grow beyond so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
