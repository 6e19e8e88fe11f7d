"""Where text comes from: documents out of files, folders, data sets or Python's own library, and which are held out.

No other file knows the formats. A document's identity is the hash of its text, and documents stand in the order of
their hashes: the same texts give the same corpus whatever their names, their order or the machine.
"""

import hashlib
import io
import json
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from parscale.errors import InputError

STDLIB = "stdlib"
"""The source that needs no download: the standard library of the running Python, as Python files."""

TEXT_SUFFIXES = (".txt", ".md", ".py")
SUFFIXES = (*TEXT_SUFFIXES, ".jsonl", *(f"{suffix}.zst" for suffix in (*TEXT_SUFFIXES, ".jsonl")), ".parquet")

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
    sources = [source] if isinstance(source, str | Path) else list(source)
    documents = (document for one in sources for document in _documents_of_source(one, text_column, split))
    distinct: dict[str, Document] = {}
    for document in documents:
        if document.text and not document.text.isspace():
            distinct.setdefault(_digest(document), document)
    if not distinct:
        named = ", ".join(map(str, sources)) or "no source"
        raise InputError(f"{named}: there is no text in it; give files or folders with {_accepted()}")
    return [distinct[digest] for digest in sorted(distinct)]


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


def _digest(document: Document) -> str:
    try:
        return document.digest
    except UnicodeEncodeError as error:
        raise InputError(
            f"{document.name}: character {error.start} is half of a surrogate pair, not text; remove it"
        ) from error


def _documents_of_source(source: str | Path, text_column: str, split: str) -> Iterator[Document]:
    if source == STDLIB:
        yield from _standard_library()
        return
    path = Path(source).expanduser()
    if not path.exists():
        if isinstance(source, Path) or not _may_be_data_set(source):
            raise InputError(f"{source}: there is no such file or folder")
        yield from _data_set(source, text_column, split)
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
            yield Document(str(file), _decode(file, _read(file)))


def _may_be_data_set(source: str) -> bool:
    name = source.partition(":")[0]
    return not source.startswith((".", "/", "~")) and not source.endswith(SUFFIXES) and 0 <= name.count("/") <= 1


def _data_set(source: str, text_column: str, split: str) -> Iterator[Document]:
    import datasets
    from rich.console import Console

    name, _, config = source.partition(":")
    bars_were_off = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with Console(stderr=True).status(f"loading data set {source}"):
            table = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{source}: neither a file or folder here nor a data set whose {split!r} split loads: {_first_line(error)}"
        ) from error
    finally:
        if not bars_were_off:
            datasets.enable_progress_bars()
    columns = table.column_names or []
    _check_column(source, text_column, columns)
    for row, text in enumerate(table[text_column]):
        yield Document(f"{source}:{row}", _text(text, f"{source}, row {row}", text_column))


def _documents_of_file(path: Path, text_column: str) -> Iterator[Document]:
    suffix = Path(path.name.removesuffix(".zst")).suffix
    if not path.name.endswith(SUFFIXES):
        raise InputError(f"{path}: cannot tell what it holds; give files that end in {_accepted()}")
    if suffix == ".parquet":
        yield from _documents_of_parquet(path, text_column)
        return
    data = _read(path)
    if path.suffix == ".zst":
        data = _decompress(path, data)
    text = _decode(path, data)
    if suffix == ".jsonl":
        yield from _documents_of_json_lines(path, text, text_column)
    else:
        yield Document(str(path), text)


def _documents_of_json_lines(path: Path, text: str, text_column: str) -> Iterator[Document]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a string
        if not line or line.isspace():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{place}: not a line of JSON: {_first_line(error)}") from error
        if not isinstance(row, dict):
            raise InputError(f'{place}: give one JSON object a line, such as {{"id": "1", "{text_column}": "…"}}')
        _check_column(place, text_column, row)
        yield Document(
            f"{place} ({row['id']!r})" if "id" in row else place, _text(row[text_column], place, text_column)
        )


def _documents_of_parquet(path: Path, text_column: str) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        columns = pyarrow.parquet.read_schema(path).names
        _check_column(str(path), text_column, columns)
        texts = pyarrow.parquet.read_table(path, columns=[text_column])[text_column].to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: column {text_column!r} holds bytes that are not UTF-8: {error.reason}") from error
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot be read as parquet: {_first_line(error)}") from error
    for row, text in enumerate(texts):
        yield Document(f"{path}:{row}", _text(text, f"{path}, row {row}", text_column))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error


def _decompress(path: Path, data: bytes) -> bytes:
    import zstandard

    whole = io.BytesIO()
    try:
        while data:
            frame = zstandard.ZstdDecompressor().decompressobj()
            whole.write(frame.decompress(data))
            if not frame.eof:  # the stream readers take a truncated frame for the end of the file
                raise InputError(f"{path}: the zstd data is truncated; fetch or compress the file again")
            data = frame.unused_data
    except zstandard.ZstdError as error:
        raise InputError(f"{path}: not readable as zstd: {_first_line(error)}") from error
    return whole.getvalue()


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: byte {data[error.start]:#04x} at offset {error.start} is not UTF-8 ({error.reason}); "
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


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
