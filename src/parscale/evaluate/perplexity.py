"""`parscale eval --data`: how well a model predicts texts: loss, perplexity and bits per byte, with an interval."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from parscale.errors import InputError
from parscale.load import load_model, load_tokenizer, on_accelerator
from parscale.output import print_json, print_table
from parscale.probe import token_losses
from parscale.streams.backbone import has_streams
from parscale.streams.diversify.calibration import evaluating
from parscale.train.corpus import Document, read_documents
from parscale.train.shapes import check_context

RESAMPLES = 2000
AS_IS: dict[str, Any] = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
"""A document is text: what spells a special token in it is none; and it is read in pieces, however long it is."""


@dataclass(frozen=True)
class DocumentLosses:
    """Of one model on some documents: each one's sum of −log p, nats, over its tokens but the first of each piece, and
    how many tokens that are; (documents,) each."""

    nats: np.ndarray
    tokens: np.ndarray
    documents: Sequence[Document]

    @property
    def mean(self) -> float:
        """Nats per token."""
        return float(self.nats.sum() / self.tokens.sum())


@dataclass(frozen=True)
class CorpusScore:
    """`loss` is nats per token, `low` and `high` its 95 % bootstrap interval over documents, NaN for one document. Bits
    per byte compare models of different tokenizers."""

    corpus: str
    documents: int
    tokens: int
    loss: float
    low: float
    high: float
    perplexity: float
    bits_per_byte: float


def evaluate(
    name: str,
    data: Sequence[str],
    *,
    streams: int | None = None,
    block_size: int = 256,
    tokens: int = 200_000,
    as_json: bool = False,
) -> list[CorpusScore]:
    """Score a model on each text, and print it.

    Args:
        name: folder or hub name of a model, with or without streams.
        data: texts, each scored by itself; nothing of them is held out.
        streams: run so many of the model's streams; by default all.
        block_size: longer documents are read in pieces of so many tokens, each without what stood before.
        tokens: of each text at most, in the order of the documents' hashes.
        as_json: print JSON instead of a table.

    Raises:
        InputError: a model, text or number that cannot serve.
    """
    if block_size < 2 or tokens < block_size:
        raise InputError(f"block_size={block_size}, tokens={tokens}: give at least 2, and at least one block of tokens")
    model, tokenizer = ready_model(name, streams)
    check_context(model, block_size, name)
    scores = [_score(model, tokenizer, text, block_size, tokens) for text in data]
    if as_json:
        print_json([asdict(score) for score in scores])
    else:
        print_table(f"{name}: nats per token", [asdict(score) for score in scores])
    return scores


def ready_model(name: str, streams: int | None) -> tuple[Any, Any]:
    """A model, on the accelerator where there is one, with so many of its streams, and its tokenizer.

    Raises:
        InputError: it cannot be loaded, or does not have so many streams.
    """
    model, tokenizer = on_accelerator(load_model(name)), load_tokenizer(name)
    if streams is not None:
        if not has_streams(model):
            raise InputError(f"streams={streams}: {name} has no streams")
        model.set_streams(streams)
    return model.eval(), tokenizer


def document_losses(
    model: Any, tokenizer: Any, documents: Sequence[Document], *, block_size: int, tokens: int, each: int | None = None
) -> DocumentLosses:
    """Losses document by document, of the first so many tokens, and of at most `each` of a document. A piece of one
    token has nothing to predict."""
    read, nats, counts, seen = [], [], [], 0
    with evaluating(model), torch.no_grad():
        for document in documents:
            if seen >= tokens:
                break
            ids = torch.tensor(tokenizer(document.text, **AS_IS)["input_ids"])[: tokens - seen][:each]
            losses = [_losses(model, piece) for piece in ids.split(block_size) if len(piece) > 1]
            if losses:
                read.append(document)
                nats.append(sum(loss.sum().item() for loss in losses))
                counts.append(sum(loss.numel() for loss in losses))
            seen += len(ids)
    return DocumentLosses(np.array(nats), np.array(counts), read)


def bootstrap_of_documents(nats: np.ndarray, tokens: np.ndarray) -> tuple[float, float]:
    """95 % interval of Σ nats / Σ tokens over documents drawn with replacement; NaN for a single document."""
    if len(nats) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(0).integers(0, len(nats), (RESAMPLES, len(nats)))
    low, high = np.percentile(nats[drawn].sum(1) / tokens[drawn].sum(1), [2.5, 97.5])
    return float(low), float(high)


def _score(model: Any, tokenizer: Any, source: str, block_size: int, tokens: int) -> CorpusScore:
    documents = read_documents(source)
    losses = document_losses(model, tokenizer, documents, block_size=block_size, tokens=tokens)
    if not len(losses.tokens):
        raise InputError(f"data={source}: no document of it has two tokens")
    low, high = bootstrap_of_documents(losses.nats, losses.tokens)
    size = sum(len(document.text.encode()) for document in losses.documents)
    ids = sum(len(tokenizer(document.text, **AS_IS)["input_ids"]) for document in losses.documents)
    return CorpusScore(
        corpus=Path(source).name,
        documents=len(losses.tokens),
        tokens=int(losses.tokens.sum()),
        loss=losses.mean,
        low=low,
        high=high,
        perplexity=math.exp(losses.mean),
        bits_per_byte=losses.mean * ids / size / math.log(2),
    )


def _losses(model: Any, piece: Tensor) -> Tensor:
    ids = piece[None].to(model.device)
    return token_losses(model(input_ids=ids, use_cache=False).logits, ids)
