"""The one atomic write: files and folders are whole or absent, whatever library writes them and whenever it is killed.

A file is written under another name beside its own, flushed to the disk and renamed. Files that go into a folder which
holds others are committed by one rename (`add_files`); `finish` moves in what a killed process had committed.
"""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from parscale.errors import InputError
from parscale.utils.lock import LOCK, hold

UNFINISHED, COMMITTED = ".parscale.partial", ".parscale.whole"
"""What is being written into a folder, and what is complete and moves into it next."""
_SCRATCH = re.compile(r"\..+\.[0-9a-f]{32}\.partial(\..+)?")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to. It becomes `path` when the block ends; if the block fails, nothing is left.

    Raises:
        OSError: it cannot be written, also where the library that writes has errors of its own.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.stem}.{uuid.uuid4().hex}.partial{path.suffix}")
    try:
        with disk_errors():
            yield scratch
        publish(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file whole or not at all, and its folder if there is none. Returns `path`."""
    with replacing(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path


def publish(scratch: Path, path: Path) -> None:
    """Flush a file or a folder to the disk and give it its name. A file of that name is replaced."""
    for folder, _, files in os.walk(scratch):
        for file in files:
            _sync(Path(folder, file))
        _sync(Path(folder))
    if not scratch.is_dir():
        _sync(scratch)
    scratch.replace(path)
    _sync(path.parent)


@contextmanager
def add_files(folder: Path, last: str | None = None) -> Iterator[Path]:
    """A folder to write files into, all of which are in `folder` when the block ends; if it fails, none is.

    One rename commits them. A process that is killed behind it leaves the rest to `finish`.

    Args:
        folder: made if absent. It stays the same folder: a shell may stand in it.
        last: the file that is moved in last, by which others know that all are there.

    Raises:
        OSError: it cannot be written, also where the library that writes has errors of its own.
    """
    scratch = folder / UNFINISHED
    try:
        scratch.mkdir(parents=True)
        with disk_errors():
            yield scratch
        publish(scratch, folder / COMMITTED)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    finish(folder, last)


def finish(folder: Path, last: str | None = None) -> None:
    """Move in what a process had committed to `add_files` before it was killed. Several processes may do so at once."""
    committed = folder / COMMITTED
    try:
        files = sorted(committed.iterdir(), key=lambda file: file.name == last)
    except (FileNotFoundError, NotADirectoryError):
        return
    for file in files:
        with suppress(FileNotFoundError):  # another process has moved it
            file.replace(folder / file.name)
    _sync(folder)
    with suppress(OSError):
        committed.rmdir()


def remove_unfinished(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder that this process holds (`hold`)."""
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    for file in folder.glob(".*"):
        if _SCRATCH.fullmatch(file.name):
            remove(file)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into; its files are in `out` when the block ends. If it fails, nothing is left. Until then no
    other process can write to `out`. What a killed process left there is no obstacle.

    Raises:
        InputError: `out` holds something, is held by another process, or cannot be written.
    """
    with hold(out, "out"):
        if out.is_dir():
            finish(out)
            remove_unfinished(out)
        check_new(out)
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"out={str(out)!r} cannot be written: {error}") from None
        with add_files(out) as folder:
            yield folder


def check_new(out: Path) -> None:
    """Refuse, before any work, a folder that holds something or cannot be written.

    Raises:
        InputError: it does, or cannot, or a file has its name.
    """
    if out.exists() and (not out.is_dir() or any(file.name != LOCK for file in out.iterdir())):
        raise InputError(f"out={str(out)!r} holds something already; give a new folder")
    if out.exists() and not os.access(out, os.W_OK):
        raise InputError(f"out={str(out)!r} cannot be written")


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise what a library says of the disk as OSError: safetensors and tokenizers have errors of their own."""
    try:
        yield
    except (OSError, InputError):
        raise
    except Exception as error:
        if (found := _OS_ERROR.search(str(error))) is None:
            raise
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
