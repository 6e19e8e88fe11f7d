"""Corpora on disk: the same rows as in memory, memory-mapped, whole or absent."""

import os
from pathlib import Path

import numpy as np
import pytest

from parscale.errors import InputError
from parscale.train import streaming
from parscale.train.corpus import Document, read_documents
from parscale.train.data import train_tokenizer
from parscale.train.streaming import side_of, stream_text


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(80):
        (folder / f"{number:02}.txt").write_text(f"Document {number}: " + f"word{number * 7 % 97} " * 30)
    (folder / "again.txt").write_text((folder / "05.txt").read_text())
    return folder


@pytest.fixture
def load(corpus: Path, tmp_path: Path):
    return lambda **options: stream_text(
        **{"source": corpus, "block_size": 16, "vocab_size": 400, "cache_dir": tmp_path / "cache"} | options
    )


def tokens_of(blocks) -> list[int]:
    return blocks["input_ids"][:].flatten().tolist()


def test_rows_are_the_documents_in_the_order_of_reading(load, corpus: Path) -> None:
    text = load(validation_fraction=0.2)
    first_of = {d.digest: d for file in sorted(corpus.iterdir()) for d in read_documents(file)}
    for side, blocks in (("train", text.train), ("validation", text.validation)):
        chosen = [d for d in first_of.values() if side_of(d, 0.2) == side]
        ids = [i for d in chosen for i in [*text.tokenizer.encode(d.text), text.tokenizer.eos_token_id]]
        assert tokens_of(blocks) == ids[: len(ids) // 16 * 16]
        assert len(chosen) == (text.train_documents if side == "train" else text.validation_documents)
    assert text.train_documents + text.validation_documents == 80  # the copy is passed over
    assert text.train_tokens == len(text.train) * 16


def test_a_side_is_decided_by_the_text_alone() -> None:
    sides = [side_of(Document(str(n), f"text {n % 1000}"), 0.05) for n in range(2000)]
    assert sides[:1000] == sides[1000:]
    assert 30 <= sides[:1000].count("validation") <= 70


def test_rows_lie_on_disk(load, tmp_path: Path) -> None:
    text = load()
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    mapped = np.memmap(entry / "train.int32", dtype=np.int32, mode="r+")
    mapped[3] = 7  # a change of the file is a change of the rows, so they are not a copy
    mapped.flush()
    assert text.train[0]["input_ids"][3] == text.train[0]["labels"][3] == 7


def test_reading_stops_at_the_limit(load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "_AT_ONCE", 500)
    everything = load()
    read = []
    iterate = streaming.iterate_documents
    monkeypatch.setattr(streaming, "iterate_documents", lambda *a, **k: (read.append(d) or d for d in iterate(*a, **k)))
    limited = load(max_train_tokens=100, tokenizer=everything.tokenizer, validation_fraction=0.3)
    assert limited.train_tokens == 96
    assert len(read) < 40


def test_the_second_time_nothing_is_read(load, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = train_tokenizer(["some text"], 300)
    first = load(tokenizer=tokenizer)
    with monkeypatch.context() as patched:
        patched.setattr(streaming, "iterate_documents", None)
        second = load(tokenizer=tokenizer)
    assert (first.fingerprint, tokens_of(first.train)) == (second.fingerprint, tokens_of(second.train))
    os.utime(corpus / "03.txt", (1, 1))
    assert load(tokenizer=tokenizer).fingerprint != first.fingerprint


def test_an_interrupted_entry_is_absent(load, corpus: Path, tmp_path: Path) -> None:
    (corpus / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        load(tokenizer=train_tokenizer(["some text"], 300))
    assert list((tmp_path / "cache" / "tokens").iterdir()) == []


def test_an_empty_corpus_is_refused(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(InputError, match="has 0 tokens"):
        stream_text(tmp_path / "nothing", tokenizer=train_tokenizer(["a"], 300), cache_dir=tmp_path)
