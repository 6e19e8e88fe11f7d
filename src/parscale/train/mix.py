"""Several corpora in one run: sequences drawn by weight, each corpus with held-out text of its own."""

import hashlib
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parscale.errors import InputError
from parscale.train.corpus import Document, read_documents, split_documents
from parscale.train.data import PackedText, check_sizes, pack, train_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_FRACTION = 0.05


def load_mix(
    sources: Sequence[str | Path],
    weights: Sequence[float],
    *,
    tokenizer: "str | Path | PreTrainedTokenizerBase | None" = None,
    vocab_size: int = 2048,
    block_size: int = 256,
    text_column: str = "text",
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> PackedText:
    """Read, split, tokenise and pack several corpora, and mix their blocks.

    A document that stands in several corpora is kept in the first, so that none is held out of one and trained on in
    another. Without a tokenizer, one is trained on all of them. `corpora` of the result are the validation blocks of
    each source under its name.

    Raises InputError as `data.load_text` does.
    """
    check_sizes(block_size, vocab_size, None)
    splits = [split_documents(documents, VALIDATION_FRACTION) for documents in _distinct(sources, text_column)]
    if tokenizer is None:
        train = chain.from_iterable(train for train, _ in splits)
        tokenizer = train_tokenizer((document.text for document in train), vocab_size)
    parts = [
        pack(
            train,
            held_out,
            name=str(source),
            held_out_name=f"{VALIDATION_FRACTION:g} of {source}",
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            block_size=block_size,
            cache_dir=cache_dir,
        )
        for source, (train, held_out) in zip(sources, splits, strict=True)
    ]
    return mix(parts, _names(sources), weights, seed)


def mix(parts: Sequence[PackedText], names: Sequence[str], weights: Sequence[float], seed: int) -> PackedText:
    """One text whose blocks come from `parts` by weight, in an order that `seed` decides.

    Every training block is there once at least: the corpora that run out first are repeated. Validation stops where the
    first corpus ends, so that the weights hold in it.
    """
    train = _interleave([part.train for part in parts], weights, seed, "all_exhausted")
    validation = _interleave([part.validation for part in parts], weights, seed, "first_exhausted")
    facts = f"{[part.fingerprint for part in parts]} {list(weights)} {seed}"
    return PackedText(
        train=train,
        validation=validation,
        tokenizer=parts[0].tokenizer,
        block_size=parts[0].block_size,
        train_tokens=len(train) * parts[0].block_size,
        validation_tokens=len(validation) * parts[0].block_size,
        train_documents=sum(part.train_documents for part in parts),
        validation_documents=sum(part.validation_documents for part in parts),
        fingerprint=hashlib.sha256(facts.encode()).hexdigest(),
        corpora=dict(zip(names, (part.validation for part in parts), strict=True)),
    )


def _distinct(sources: Sequence[str | Path], text_column: str) -> list[list[Document]]:
    seen: set[str] = set()
    corpora = []
    for source in sources:
        documents = [d for d in read_documents(source, text_column=text_column) if d.digest not in seen]
        if not documents:
            raise InputError(f"{source}: all its documents are in the corpora before it; leave it out")
        seen.update(document.digest for document in documents)
        corpora.append(documents)
    return corpora


def _names(sources: Sequence[str | Path]) -> list[str]:
    """The last part of each source's name, with a number where two are alike."""
    names: list[str] = []
    for source in sources:
        name = Path(source).name or str(source)
        names.append(name if name not in names else f"{name}-{len(names)}")
    return names


def _interleave(parts: list[Any], weights: Sequence[float], seed: int, until: Any) -> Any:
    from datasets import interleave_datasets

    shares = [weight / sum(weights) for weight in weights]
    mixed = interleave_datasets(parts, probabilities=shares, seed=seed, stopping_strategy=until)
    return mixed.with_format("torch")
