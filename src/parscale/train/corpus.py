"""Where text comes from: documents out of files, folders, data sets or Python's own library, and which are held out.

No other file knows the formats. A document's identity is the hash of its text, and documents stand in the order of
their hashes: the same texts give the same corpus whatever their names, their order or the machine.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parscale.errors import InputError, first_line

STDLIB = "stdlib"
"""The source that needs no download: the standard library of the running Python, as Python files."""

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", *(f"{suffix}.zst" for suffix in (*TEXT_SUFFIXES, ".jsonl")), ".parquet")
_ROWS = (".jsonl", ".jsonl.zst")
_CHUNK = 1 << 20  # bytes read at once

Source = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Document:
    """A text and where it stands (a file, `file:line` or `data set:row`), for messages."""

    name: str
    text: str

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the text in UTF-8, in hexadecimal: what makes two documents the same."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_documents(source: Source, *, text_column: str = "text", split: str = "train") -> list[Document]:
    """The distinct, non-blank documents of `source`, in the order of their hashes.

    `source` is `"stdlib"`, a folder (searched recursively for `SUFFIXES`; hidden files are passed over), a file,
    several of these, or a Hugging Face data set as `name` or `name:config`, of which `split` is read. Text files are
    one document each; JSON lines and tables give one document a row, from `text_column`.

    Raises InputError for what is missing, unreadable, not UTF-8, malformed, without `text_column`, or empty.
    """
    distinct = {document.digest: document for document in iterate_documents(source, text_column, split)}
    if not distinct:
        named = ", ".join(map(str, as_list(source))) or "no source"
        raise InputError(f"{named}: there is no text in it; give files or folders with {_accepted()}")
    return [distinct[digest] for digest in sorted(distinct)]


def iterate_documents(
    source: Source, text_column: str = "text", split: str = "train", streaming: bool = False
) -> Iterator[Document]:
    """The distinct, non-blank documents of `source` as they are read, a line or a row in memory at a time; of those
    before, 16 bytes each. `streaming` reads data sets over the network too, instead of fetching them first.

    Raises InputError as `read_documents` does, when it comes to the fault.
    """
    seen: set[bytes] = set()
    for one in as_list(source):
        for document in _documents_of_source(one, text_column, split, streaming):
            if document.text and not document.text.isspace():
                key = bytes.fromhex(_digest(document)[:32])
                if key not in seen:
                    seen.add(key)
                    yield document


def read_rows(source: Source, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, row) of JSON lines (.jsonl, .jsonl.zst; also a folder of them) or of a Hugging Face data set.

    Raises InputError for what is missing, unreadable or not JSON lines.
    """
    for one in as_list(source):
        path = Path(one).expanduser()
        if path.is_dir():
            files = [file for file in sorted(path.rglob("*.jsonl*")) if file.name.endswith(_ROWS)]
            if not files:
                raise InputError(f"{one}: no JSON lines are in it; give files that end in {', '.join(_ROWS)}")
            yield from (row for file in files for row in _json_rows(file))
        elif path.is_file() and path.name.endswith(_ROWS):
            yield from _json_rows(path)
        elif path.exists() or isinstance(one, Path) or not _may_be_data_set(one):
            raise InputError(f"{one}: give an existing file that ends in {' or '.join(_ROWS)}, or a data set's name")
        else:
            yield from ((f"{one}, row {n}", dict(row)) for n, row in enumerate(_open_data_set(one, split, False)))


def check_there(source: Source) -> None:
    """Raise InputError for a file or folder that does not exist. A data set's name may be any but a path's."""
    for one in as_list(source):
        may_be_data_set = isinstance(one, str) and (one == STDLIB or _may_be_data_set(one))
        if not (may_be_data_set or Path(one).expanduser().exists()):
            raise InputError(f"{one}: there is no such file or folder")


def as_list(source: Source) -> list[str | Path]:
    """A source, or several, as a list."""
    return [source] if isinstance(source, str | Path) else list(source)


def split_documents(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, validation): documents, taken in the order of their hashes, are validation as long as they fit in
    `fraction` of the characters; where none fits, the shortest one is. A single document gives its end.

    Raises InputError where `fraction` is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise InputError(f"validation_fraction={fraction}: give a number between 0 and 1, such as 0.05")
    room = round(fraction * sum(len(document.text) for document in documents))
    if len(documents) == 1:
        (only,) = documents
        cut = len(only.text) - room
        return [Document(only.name, only.text[:cut])], [Document(f"{only.name} (its end)", only.text[cut:])]

    held_out = set()
    for document in sorted(documents, key=lambda document: document.digest):
        if len(document.text) <= room:
            held_out.add(document.digest)
            room -= len(document.text)
    if not held_out:
        held_out = {min(documents, key=lambda document: (len(document.text), document.digest)).digest}
    train = [document for document in documents if document.digest not in held_out]
    return train, [document for document in documents if document.digest in held_out]


def check_disjoint(train: Iterable[Document], validation: Iterable[Document]) -> None:
    """Raises InputError naming a document whose text is in both."""
    by_digest = {document.digest: document for document in train}
    shared = [document for document in validation if document.digest in by_digest]
    if shared:
        name, twin = shared[0].name, by_digest[shared[0].digest].name
        more = f" (and {len(shared) - 1} more)" if len(shared) > 1 else ""
        raise InputError(f"validation document {name}{more} is in the training text too, as {twin}: remove one of them")


def overlap(train: Iterable[Document], held_out: Iterable[Document], words: int = 13) -> float:
    """Share of the runs of so many words in `held_out` that stand in `train` too, in [0, 1]: near copies that
    `check_disjoint` does not see. Where it is large, a loss on the held-out text tells of memory as well.

    >>> overlap([Document("a", "one two three four")], [Document("b", "two three four five")], words=3)
    0.5
    """
    wanted = set[int]().union(*(_runs(document.text, words) for document in held_out))
    found = set[int]()
    for document in train:
        found |= wanted & _runs(document.text, words)
    return len(found) / len(wanted) if wanted else 0.0


def _runs(text: str, words: int) -> set[int]:
    """Hashes of all runs of so many words."""
    given = text.split()
    return {hash(run) for run in zip(*(given[i:] for i in range(words)))}


def _digest(document: Document) -> str:
    try:
        return document.digest
    except UnicodeEncodeError as error:
        raise InputError(
            f"{document.name}: character {error.start} is half of a surrogate pair, not text; remove it"
        ) from error


def _documents_of_source(source: str | Path, text_column: str, split: str, streaming: bool) -> Iterator[Document]:
    if source == STDLIB:
        yield from _standard_library()
        return
    check_there(source)
    path = Path(source).expanduser()
    if not path.exists():
        yield from _data_set(str(source), text_column, split, streaming)
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
            if file.name.endswith(SUFFIXES) and not hidden and file.is_file():
                yield from _documents_of_file(file, text_column)
    else:
        yield from _documents_of_file(path, text_column)


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    # tests hold files that are broken on purpose; lib2to3 is gone from Python 3.13; the tables of encodings are near
    # copies of one another, which would stand on both sides of the split
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings"}
    for file in sorted(root.rglob("*.py")):
        if left_out.isdisjoint(file.relative_to(root).parts):
            yield Document(str(file), _decode(file, b"".join(_read(file))))


def _may_be_data_set(source: str) -> bool:
    name = source.partition(":")[0]
    return not source.startswith((".", "/", "~")) and not source.endswith(SUFFIXES) and 0 <= name.count("/") <= 1


def _data_set(source: str, text_column: str, split: str, streaming: bool) -> Iterator[Document]:
    table = _open_data_set(source, split, streaming)
    if table.column_names:  # a data set that streams may not know them
        _check_column(source, text_column, table.column_names)
        table = table.select_columns([text_column])
    for number, row in enumerate(table):
        _check_column(source, text_column, row)
        yield Document(f"{source}:{number}", _text(row[text_column], f"{source}, row {number}", text_column))


def _open_data_set(source: str, split: str, streaming: bool) -> Any:
    import datasets
    from rich.console import Console

    name, _, config = source.partition(":")
    options: dict[str, Any] = {"streaming": True} if streaming else {}
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with Console(stderr=True).status(f"loading data set {source}"):
            return datasets.load_dataset(name, config or None, split=split, **options)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{source}: neither a file or folder here nor a data set whose {split!r} split loads: {first_line(error)}"
        ) from error
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()


def _documents_of_file(path: Path, text_column: str) -> Iterator[Document]:
    suffix = Path(path.name.removesuffix(".zst")).suffix
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: cannot tell what it holds; give files that end in {_accepted()}")
    if suffix == ".parquet":
        yield from _documents_of_parquet(path, text_column)
    elif suffix == ".jsonl":
        for place, row in _json_rows(path):
            _check_column(place, text_column, row)
            name = f"{place} ({row['id']!r})" if "id" in row else place
            yield Document(name, _text(row[text_column], place, text_column))
    else:
        yield Document(str(path), _whole_text(path))


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and the object of every line that is not blank, one line in memory at a time."""
    offset = 0
    for number, data in enumerate(_lines(_chunks(path)), start=1):
        place, line = f"{path}:{number}", _decode(path, data, offset)
        offset += len(data)
        if line.isspace():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not a line of JSON: {first_line(error)}") from error
        if not isinstance(row, dict):
            raise InputError(f'{place}: give one JSON object a line, such as {{"id": "1", "text": "…"}}')
        yield place, row


def _documents_of_parquet(path: Path, text_column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    _check_regular(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_column(str(path), text_column, file.schema_arrow.names)
            batches = file.iter_batches(columns=[text_column])
            texts = (text for batch in batches for text in batch[text_column].to_pylist())
            for row, text in enumerate(texts):
                yield Document(f"{path}:{row}", _text(text, f"{path}, row {row}", text_column))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: column {text_column!r} holds bytes that are not UTF-8: {error.reason}") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet: {first_line(error)}") from error


def _whole_text(path: Path) -> str:
    try:
        return _decode(path, b"".join(_chunks(path)))
    except MemoryError:
        raise InputError(f"{path}: does not fit in memory; cut it into documents, one a line of a .jsonl") from None


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends. `splitlines` would also cut at U+2028, which may stand inside a JSON string."""
    begun: list[bytes] = []
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for line in ended:
            yield b"".join([*begun, line, b"\n"])
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield last


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed if it ends in .zst, a piece at a time."""
    chunks = _read(path)
    return _decompressed(path, chunks) if path.suffix == ".zst" else chunks


def _read(path: Path) -> Iterator[bytes]:
    _check_regular(path)
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _check_regular(path: Path) -> None:
    """Refuse what has no end, as a device, or waits for another process, as a pipe."""
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: not a regular file; copy what it gives into one")


def _decompressed(path: Path, chunks: Iterable[bytes]) -> Iterator[bytes]:
    import zstandard

    frame = None
    try:
        for chunk in chunks:
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(chunk)
                chunk = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: not readable as zstd: {first_line(error)}") from error
    if frame is not None:  # the stream readers take a truncated frame for the end of the file
        raise InputError(f"{path}: the zstd data is truncated; fetch or compress the file again")


def _decode(path: Path, data: bytes, offset: int = 0) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {data[error.start]:#04x} at offset {offset + error.start} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8 or leave it out"
        ) from error


def _check_column(place: str, text_column: str, columns: Iterable[str]) -> None:
    if text_column not in columns:
        raise InputError(f"{place}: no column {text_column!r}; text_column may be {', '.join(columns) or 'none here'}")


def _text(value: Any, place: str, text_column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{place}: column {text_column!r} holds {type(value).__name__}, not text")
    return value


def _accepted() -> str:
    return ", ".join(SUFFIXES)
