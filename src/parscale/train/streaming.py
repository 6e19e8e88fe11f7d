"""Corpora larger than memory: documents are read one by one, and tokens stay on disk, memory-mapped.

What differs from `data.load_text`: documents stand in the order in which they are read, a document is held out by its
own hash alone, and a cache entry is known by the names, sizes and times of the files, not by their content.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from parscale.errors import InputError
from parscale.output import say
from parscale.train.corpus import Document, Source, as_list, iterate_documents
from parscale.train.data import (
    PackedText,
    blocks,
    cache_folder,
    check_sizes,
    given_tokenizer,
    identity,
    tokenize,
    train_tokenizer,
    unwritable,
)
from parscale.utils.files import publish, remove
from parscale.utils.hashes import damage_of, write_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT = 1  # of the entries; raise it when the same files would give other tokens
SIDES = ("train", "validation")
_DOCUMENTS = "documents.json"

_TOKENIZER_SAMPLE = 20_000_000  # characters
_AT_ONCE = 8_000_000  # characters given to the tokenizer at once


def stream_text(
    source: Source,
    *,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    vocab_size: int = 2048,
    block_size: int = 256,
    validation_fraction: float = 0.05,
    text_column: str = "text",
    max_train_tokens: int | None = None,
    cache_dir: str | Path | None = None,
) -> PackedText:
    """Read, split, tokenise and pack `source` (see `corpus.read_documents`) in constant memory.

    A document is held out where the first 64 bits of its hash, read as a fraction, are below `validation_fraction`.
    Reading stops once there are `max_train_tokens`. Without a tokenizer, a byte-level BPE is trained on the first
    20 million characters that are not held out. The rows are `PackedText`'s, on disk.

    Raises InputError, one line, for a source, tokenizer, size or cache folder that cannot serve.
    """
    check_sizes(block_size, vocab_size, max_train_tokens)
    if not 0 < validation_fraction < 1:
        raise InputError(f"validation_fraction={validation_fraction}: give a number between 0 and 1, such as 0.05")
    if tokenizer is None:
        texts = _first(iterate_documents(source, text_column, streaming=True), validation_fraction)
        chosen = train_tokenizer(texts, vocab_size)
    else:
        chosen = given_tokenizer(tokenizer)
    facts = [FORMAT, _state(source), text_column, identity(chosen), validation_fraction, max_train_tokens]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    entry = cache_folder(cache_dir) / f"{key}.streamed"
    tokens = _read(entry) or _make(
        entry, iterate_documents(source, text_column, streaming=True), chosen, validation_fraction, max_train_tokens
    )
    name = ", ".join(map(str, as_list(source)))
    fingerprint = hashlib.sha256(f"{key} {block_size}".encode()).hexdigest()
    train, validation = (blocks(tokens.of[side], block_size, f"{side} text ({name})", fingerprint) for side in SIDES)
    return PackedText(
        train=train,
        validation=validation,
        tokenizer=chosen,
        block_size=block_size,
        train_tokens=len(train) * block_size,
        validation_tokens=len(validation) * block_size,
        train_documents=tokens.documents["train"],
        validation_documents=tokens.documents["validation"],
        fingerprint=fingerprint,
    )


def side_of(document: Document, validation_fraction: float) -> str:
    """ "train" or "validation", by the hash of the text."""
    return SIDES[int(document.digest[:16], 16) / 2**64 < validation_fraction]


def _first(documents: Iterable[Document], validation_fraction: float) -> Iterator[str]:
    left = _TOKENIZER_SAMPLE
    for document in documents:
        if side_of(document, validation_fraction) == "train":
            yield document.text[:left]
            left -= len(document.text)
            if left <= 0:
                return


def _state(source: Source) -> list[Any]:
    """What tells a source from another one, and from itself before a change, without reading it."""
    state: list[Any] = []
    for one in as_list(source):
        path = Path(one).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found = [file for file in files if file.is_file()]
        state.append([str(one), [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in found]])
    return state


@dataclass(frozen=True)
class _Tokens:
    """An entry of the cache: (tokens,) int32 and the number of documents, of each side."""

    of: dict[str, np.ndarray]
    documents: dict[str, int]


def _read(entry: Path) -> _Tokens | None:
    """The entry; None where it is absent or damaged, which is told."""
    if not os.path.lexists(entry):
        return None
    if (damage := damage_of(entry)) is not None:
        say(f"cache entry {entry} is damaged ({damage}); its tokens are made anew")
        return None
    try:
        return _open(entry)
    except FileNotFoundError:  # another process had found it damaged, and makes it anew
        return None


def _open(folder: Path) -> _Tokens:
    of = {side: _mapped(folder / f"{side}.int32") for side in SIDES}
    return _Tokens(of, json.loads((folder / _DOCUMENTS).read_text()))


def _make(
    entry: Path, documents: Iterable[Document], tokenizer: Any, validation_fraction: float, limit: int | None
) -> _Tokens:
    """Make the entry, which is whole or absent. Several processes may make it at once: each has what it wrote itself,
    which outlives its name."""
    scratch = entry.with_name(f".{entry.name}.{uuid.uuid4().hex}.partial")
    try:
        scratch.mkdir()
        _write(scratch, documents, tokenizer, validation_fraction, limit)
        write_hashes(scratch)
        made = _open(scratch)
        remove(entry)
        try:
            publish(scratch, entry)
        except OSError:
            if not entry.exists():  # else another process was first, with the same
                raise
        return made
    except OSError as error:
        raise unwritable(entry.parent, error) from error
    finally:
        remove(scratch)


def _write(
    folder: Path, documents: Iterable[Document], tokenizer: Any, validation_fraction: float, limit: int | None
) -> None:
    counts, tokens = dict.fromkeys(SIDES, 0), dict.fromkeys(SIDES, 0)
    with ExitStack() as stack:
        files = {side: stack.enter_context((folder / f"{side}.int32").open("wb")) for side in SIDES}
        for batch in _batches(documents):
            for side in SIDES:
                chosen = [document for document in batch if side_of(document, validation_fraction) == side]
                counts[side] += len(chosen)
                for ids, _ in tokenize(tokenizer, chosen):
                    kept = ids if side == "validation" or limit is None else ids[: limit - tokens[side]]
                    files[side].write(kept.tobytes())
                    tokens[side] += len(kept)
            if limit is not None and tokens["train"] >= limit:
                break
    (folder / _DOCUMENTS).write_text(json.dumps(counts))


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _AT_ONCE:
            yield batch
            batch, size = [], 0
    yield batch


def _mapped(path: Path) -> np.ndarray:
    """(tokens,) int32, read from disk where it is looked at."""
    return np.memmap(path, dtype=np.int32, mode="r") if path.stat().st_size else np.empty(0, np.int32)
