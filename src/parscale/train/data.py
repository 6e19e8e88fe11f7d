"""From documents to packed token blocks: the tokenizer, the blocks and the cache of tokens on disk.

No other file knows how documents are joined and cut (one end-of-text token after each document, blocks of equal
length, the remainder dropped), nor what the cache's entries are called and hold.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from parscale.errors import InputError
from parscale.output import passing_bar, say
from parscale.train.corpus import STDLIB, Document, Source, check_disjoint, overlap, read_documents, split_documents
from parscale.utils.files import replacing

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257  # every byte, and END_OF_TEXT
FORMAT = 1  # of the cache; raise it when the same documents would give other tokens

_CHECKSUM_BYTES = hashlib.sha256().digest_size  # an entry is the checksum of the rest, then a safetensors file
_PIECE = 1_000_000  # characters given to the tokenizer at once: it needs about 170 bytes of memory for each
_TOKENIZER_SAMPLE = 20_000_000  # characters: more do not change a small vocabulary, and cost seconds


@dataclass(frozen=True)
class PackedText:
    """A corpus ready to train on.

    `train` and `validation` are data sets of `input_ids` and `labels`, each (block_size,) int64, as the Trainer takes
    them. Token counts are of whole blocks. `fingerprint` is equal where documents, tokenizer and blocks are equal.
    `corpora` are validation blocks of single corpora, by name, whose loss is measured too. Where `end_of_text` is a
    token, no document sees another one in its block (`separate.collator`). `overlap` is the share of the held-out text
    that stands in the training text too (`corpus.overlap`); None where it was not looked at.
    """

    train: "Dataset"
    validation: "Dataset"
    tokenizer: "PreTrainedTokenizerBase"
    block_size: int
    train_tokens: int
    validation_tokens: int
    train_documents: int
    validation_documents: int
    fingerprint: str
    corpora: "dict[str, Dataset]" = field(default_factory=dict)
    end_of_text: int | None = None
    overlap: float | None = None

    @property
    def tokens_per_row(self) -> float:
        """Training tokens in a row: the block size, or the mean length of examples."""
        return self.train_tokens / len(self.train)


def sample(blocks: "Dataset", count: int) -> "Tensor":
    """Token ids (B, T) of the first `count` rows, cut to the shortest of them."""
    import torch

    rows = [torch.as_tensor(row) for row in blocks[:count]["input_ids"]]
    shortest = min(map(len, rows))
    return torch.stack([row[:shortest] for row in rows])


def load_text(
    source: Source = STDLIB,
    *,
    validation: Source | None = None,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    vocab_size: int = 2048,
    block_size: int = 256,
    validation_fraction: float = 0.05,
    text_column: str = "text",
    max_train_tokens: int | None = None,
    cache_dir: str | Path | None = None,
) -> PackedText:
    """Read, split, tokenise and pack `source` (see `corpus.read_documents`).

    `validation` is a source of its own; without one, `validation_fraction` of the characters is held out by document.
    `tokenizer` is a name, a folder or an object; without one, a byte-level BPE of at most `vocab_size` tokens is
    trained on the training documents. `max_train_tokens` keeps that many tokens of the training documents, which stand
    in the order of their hashes: a sample. The cache is in `cache_dir`, else $PARSCALE_CACHE, else ~/.cache/parscale.

    Raises InputError, one line, for a source, tokenizer, size or cache folder that cannot serve.
    """
    check_sizes(block_size, vocab_size, max_train_tokens)
    train, held_out = _documents(source, validation, validation_fraction, text_column)
    return pack(
        train,
        held_out,
        name=_name(source),
        held_out_name=f"{validation_fraction:g} of {_name(source)}" if validation is None else _name(validation),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        block_size=block_size,
        max_train_tokens=max_train_tokens,
        cache_dir=cache_dir,
    )


def pack(
    train: Sequence[Document],
    held_out: Sequence[Document],
    *,
    name: str,
    held_out_name: str,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None",
    vocab_size: int,
    block_size: int,
    max_train_tokens: int | None = None,
    cache_dir: str | Path | None = None,
) -> PackedText:
    """Tokenise and pack documents that are split already; arguments and errors are those of `load_text`, with names of
    the two sides for messages."""
    given = None if tokenizer is None else given_tokenizer(tokenizer)
    key = _key(train, held_out, identity(given) if given else f"byte-level BPE, {vocab_size}", max_train_tokens)

    entry = cache_folder(cache_dir) / f"{key}.tokens"
    tokens = _load(entry)
    if tokens is None:
        trained = given or train_tokenizer((document.text for document in train), vocab_size)
        tokens = {
            "train": _tokenize(trained, train, max_train_tokens),
            "validation": _tokenize(trained, held_out, None),
            # a tokenizer trained here is part of the entry; one that was given is not
            "tokenizer": np.frombuffer(b"" if given else _backend_json(trained).encode(), dtype=np.uint8),
            "overlap": np.array([overlap(train, held_out)]),
        }
        _store(entry, tokens)

    fingerprint = hashlib.sha256(f"{key} {block_size}".encode()).hexdigest()
    train_blocks = blocks(tokens["train"], block_size, f"training text ({name})", fingerprint)
    validation_blocks = blocks(tokens["validation"], block_size, f"validation text ({held_out_name})", fingerprint)
    return PackedText(
        train=train_blocks,
        validation=validation_blocks,
        tokenizer=given or _wrap(tokens["tokenizer"].tobytes().decode()),
        block_size=block_size,
        train_tokens=len(train_blocks) * block_size,
        validation_tokens=len(validation_blocks) * block_size,
        train_documents=len(train),
        validation_documents=len(held_out),
        fingerprint=fingerprint,
        overlap=float(tokens["overlap"][0]) if "overlap" in tokens else None,
    )


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerBase":
    """A byte-level BPE: every text decodes to itself. `<|endoftext|>` is its end, begin and padding token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_first_characters(texts, _TOKENIZER_SAMPLE), trainer)
    return _wrap(backend.to_str())


def check_sizes(block_size: int, vocab_size: int, max_train_tokens: int | None) -> None:
    if block_size < 2:
        raise InputError(f"block_size={block_size}: give at least 2 tokens, one to read and one to predict")
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"vocab_size={vocab_size}: give at least {SMALLEST_VOCABULARY}, every byte and {END_OF_TEXT} being a token"
        )
    if max_train_tokens is not None and max_train_tokens < block_size:
        raise InputError(f"max_train_tokens={max_train_tokens}: give at least one block of {block_size} tokens")


def _documents(
    source: Source, validation: Source | None, fraction: float, text_column: str
) -> tuple[list[Document], list[Document]]:
    documents = read_documents(source, text_column=text_column)
    if validation is None:
        return split_documents(documents, fraction)
    held_out = read_documents(validation, text_column=text_column, split="validation")
    check_disjoint(documents, held_out)
    return documents, held_out


def given_tokenizer(tokenizer: "str | Path | PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    if isinstance(tokenizer, str | Path):
        from parscale.load import load_tokenizer

        loaded = load_tokenizer(tokenizer)
    else:
        loaded = tokenizer
    if loaded.eos_token_id is None:
        raise InputError(
            f"tokenizer={loaded.name_or_path or type(loaded).__name__}: it has no end-of-text token to put between "
            "documents; set its eos_token"
        )
    return loaded


def identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """All that decides which tokens a text becomes."""
    if not tokenizer.is_fast:
        return json.dumps([type(tokenizer).__name__, tokenizer.eos_token_id, sorted(tokenizer.get_vocab().items())])
    backend = json.loads(_backend_json(tokenizer))
    settings = {name: value for name, value in backend.items() if name not in ("padding", "truncation")}
    return json.dumps([tokenizer.eos_token_id, settings], sort_keys=True)


def _backend_json(tokenizer: "PreTrainedTokenizerBase") -> str:
    return cast("PreTrainedTokenizerFast", tokenizer).backend_tokenizer.to_str()


def _wrap(backend_json: str) -> "PreTrainedTokenizerBase":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend_json),
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )


def _first_characters(texts: Iterable[str], limit: int) -> Iterator[str]:
    for text in texts:
        if limit <= 0:
            return
        yield from _pieces(text[:limit])
        limit -= len(text)


def _pieces(text: str) -> Iterator[str]:
    """`text` cut after line ends, so that one long file does not take all memory."""
    start = 0
    while len(text) - start > _PIECE:
        end = text.rfind("\n", start, start + _PIECE) + 1 or start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def _tokenize(tokenizer: "PreTrainedTokenizerBase", documents: Sequence[Document], limit: int | None) -> np.ndarray:
    """(tokens,) int32: each document's tokens and one end-of-text token, no more than `limit`."""
    parts: list[np.ndarray] = []
    count = 0
    with passing_bar() as progress:
        task = progress.add_task("tokenising", total=sum(len(document.text) for document in documents))
        for ids, characters in tokenize(tokenizer, documents):
            parts.append(ids)
            count += len(ids)
            progress.advance(task, characters)
            if limit is not None and count >= limit:
                break
    return np.concatenate(parts)[:limit]


def tokenize(tokenizer: "PreTrainedTokenizerBase", documents: Iterable[Document]) -> Iterator[tuple[np.ndarray, int]]:
    """(tokens,) int32 and the characters that they are of, piece by piece; an end-of-text token ends each document."""
    for texts, ends in _batches(documents):
        ids = tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,  # a text that spells a special token must not end its document
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        pieces = [[*piece, tokenizer.eos_token_id] if end else piece for piece, end in zip(ids, ends, strict=True)]
        yield np.fromiter(chain.from_iterable(pieces), dtype=np.int32), sum(map(len, texts))


def _batches(documents: Iterable[Document]) -> Iterator[tuple[list[str], list[bool]]]:
    """Pieces of documents, about `_PIECE` characters a batch, and whether each is the last of its document."""
    texts: list[str] = []
    ends: list[bool] = []
    size = 0
    for document in documents:
        pieces = list(_pieces(document.text))
        for number, piece in enumerate(pieces, start=1):
            if size + len(piece) > _PIECE and texts:
                yield texts, ends
                texts, ends, size = [], [], 0
            texts.append(piece)
            ends.append(number == len(pieces))
            size += len(piece)
    if texts:
        yield texts, ends


def _name(source: Source) -> str:
    return str(source) if isinstance(source, str | Path) else ", ".join(map(str, source))


def blocks(tokens: np.ndarray, block_size: int, name: str, fingerprint: str) -> "Dataset":
    """(tokens,) → a data set of tokens // block_size rows. Both columns share one buffer."""
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable

    count = len(tokens) // block_size
    if count == 0:
        raise InputError(
            f"the {name} has {len(tokens)} tokens, fewer than one block of {block_size}: "
            "give more text or a smaller block_size"
        )
    column = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(tokens[: count * block_size]), block_size)
    table = InMemoryTable(pyarrow.table({"input_ids": column, "labels": column}))
    return Dataset(table, fingerprint=hashlib.sha256(f"{fingerprint} {name}".encode()).hexdigest()).with_format("torch")


def _key(train: Sequence[Document], validation: Sequence[Document], tokenizer: str, limit: int | None) -> str:
    digests = [[document.digest for document in documents] for documents in (train, validation)]
    return hashlib.sha256(json.dumps([FORMAT, digests, tokenizer, limit]).encode()).hexdigest()


def cache_folder(cache_dir: str | Path | None) -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "parscale"
    folder = Path(cache_dir or os.environ.get("PARSCALE_CACHE") or home).expanduser() / "tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def _load(entry: Path) -> dict[str, np.ndarray] | None:
    """The entry's arrays; None where it is absent or damaged, which is told."""
    from safetensors.numpy import load

    try:
        content = entry.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cache entry {entry}: cannot be read: {error.strerror or error}") from error
    checksum, arrays = content[:_CHECKSUM_BYTES], content[_CHECKSUM_BYTES:]
    if hashlib.sha256(arrays).digest() == checksum:
        return load(arrays)
    say(f"cache entry {entry} is damaged; its tokens are made anew")
    return None


def _store(entry: Path, arrays: dict[str, np.ndarray]) -> None:
    """Leaves the entry whole or not at all. Processes that write it at once write the same; the last one's stays."""
    from safetensors.numpy import save

    content = save(arrays)
    try:
        with replacing(entry) as scratch:
            scratch.write_bytes(hashlib.sha256(content).digest() + content)
    except OSError as error:
        raise unwritable(entry.parent, error) from error


def unwritable(folder: Path, error: OSError) -> InputError:
    return InputError(
        f"cache folder {folder}: cannot be written: {error.strerror or error}; make room or give another cache_dir"
    )
