"""One process at a time in a folder: `flock` on a file in it, which names the process.

The system gives the lock back when its process dies, however it dies. `filelock` takes the same lock; it does not say
who holds it, and leaves its file behind.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from parscale.errors import InputError
from parscale.output import say

LOCK = "run.lock"
"""The file in a folder that says which process works there."""

_HELD: ContextVar[tuple[Path, ...]] = ContextVar("held", default=())
"""Folders that this thread holds."""
_OPEN = set[int]()
"""The open files of all locks of this process."""


@contextmanager
def hold(folder: Path, argument: str = "output") -> Iterator[None]:
    """Hold a folder, made if absent, until the block ends; whoever holds it already may do so again. A folder that was
    made here, and in which nothing is when the block fails, is removed.

    A folder that cannot be written is held by nobody: whoever writes says so.

    Raises:
        InputError: another process, or another thread of this one, holds it. Names the process.
    """
    place = folder.resolve()
    if place in _HELD.get():
        yield
        return
    made = not place.exists()
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield
        return
    owner, handle = os.getpid(), _lock(place / LOCK, f"{argument}={str(folder)!r}")
    token = _HELD.set((*_HELD.get(), place))
    try:
        yield
    except BaseException:
        _release(place, handle, owner, empty=made)
        raise
    else:
        _release(place, handle, owner)
    finally:
        _HELD.reset(token)


def _lock(file: Path, named: str) -> int:
    """The open file, locked and with this process's name in it."""
    while True:
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:  # another process failed, and took its empty folder away
            file.parent.mkdir(parents=True, exist_ok=True)
            continue
        except OSError as error:
            raise InputError(f"{named}: cannot write {file.name} there ({error.strerror})") from None
        _OPEN.add(handle)
        try:
            if not _take(handle, file):
                raise InputError(
                    f"{named} is in use by {_holder(handle)}; wait until that has ended, or give another folder"
                )
            if _is_in_place(handle, file):
                os.ftruncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return handle
        except OSError as error:
            file.unlink(missing_ok=True)
            _close(handle)
            raise InputError(f"{named}: cannot write {file.name} there ({error.strerror})") from None
        except BaseException:
            _close(handle)
            raise
        _close(handle)


def _take(handle: int, file: Path) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # some network file systems have none
        say(f"{file.parent} cannot be locked ({error.strerror}); start no second run there")
    return True


def _is_in_place(handle: int, file: Path) -> bool:
    """Whether the locked file is still the one of that name: its process removes it before it gives it back."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), file.stat())
    return False


def _holder(handle: int) -> str:
    for _ in range(20):  # it writes its name right after it has the lock
        if told := os.pread(handle, 200, 0).decode(errors="replace").strip():
            return "".join(letter for letter in told if letter.isprintable())
        time.sleep(0.01)
    return "another process"


def _release(place: Path, handle: int, owner: int, empty: bool = False) -> None:
    if os.getpid() != owner:  # a fork, which has closed its copy already
        return
    with suppress(OSError):
        (place / LOCK).unlink()
        if empty:
            place.rmdir()
    _close(handle)


def _close(handle: int) -> None:
    _OPEN.discard(handle)
    with suppress(OSError):
        os.close(handle)


def _forget() -> None:
    """Close a fork's copies: with them the lock would outlive its process."""
    for handle in list(_OPEN):
        _close(handle)
    _HELD.set(())


os.register_at_fork(after_in_child=_forget)
