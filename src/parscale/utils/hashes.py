"""Hashes of a folder's files, beside them: whether it still holds what was written."""

import hashlib
import json
import stat
from pathlib import Path

from parscale.utils.files import write_text

HASHES = "sha256.json"
"""The file with the hash of every other one in its folder."""


def write_hashes(folder: Path) -> None:
    """Write `HASHES` into a folder of files.

    Raises:
        OSError: a file cannot be read, or `HASHES` not be written.
    """
    write_text(folder / HASHES, _text({file.name: _hash(file) for file in _others(folder)}))


def damage_of(folder: Path) -> str | None:
    """What a folder that `write_hashes` was called on lacks, has too much or has otherwise now; None if nothing."""
    try:
        held = json.loads((folder / HASHES).read_bytes()) if _is_regular(folder / HASHES) else None
        if not isinstance(held, dict):
            return f"{HASHES} is missing"
        found = _others(folder)
        if missing := sorted(held.keys() - {file.name for file in found}):
            return f"{missing[0]} is missing"
        for file in found:
            if not _is_regular(file) or held.get(file.name) != _hash(file):
                return f"{file.name} is not what {HASHES} says"
        if (folder / HASHES).read_bytes() != _text(held).encode():
            return f"{HASHES} is not what was written"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror or error}"
    except (ValueError, RecursionError):
        return f"{HASHES} is not what was written"
    return None


def _others(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.name != HASHES)


def _is_regular(file: Path) -> bool:
    """Whether it is a file, and none that is read without end or waited for."""
    try:
        return stat.S_ISREG(file.lstat().st_mode)
    except FileNotFoundError:
        return False


def _hash(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _text(hashes: dict[str, str]) -> str:
    return json.dumps(hashes, indent=1, sort_keys=True)
