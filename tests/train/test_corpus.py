import json
import os
import sysconfig
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from parscale.errors import InputError
from parscale.train.corpus import Document, check_disjoint, overlap, read_documents, split_documents


def texts(source, **options) -> set[str]:
    return {document.text for document in read_documents(source, **options)}


def json_lines(*rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def refused(source, **options) -> str:
    with pytest.raises(InputError) as raised:
        read_documents(source, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.fixture
def every_kind(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_bytes(b"one\r\n")
    (folder / "b.md").write_text("# two")
    (folder / "deeper" / "c.py").write_text("three = 3")
    (folder / "d.jsonl").write_bytes(json_lines({"id": "x", "text": "four\u2028still four"}, {"text": "five"}) + b"\n")
    two_frames = zstandard.compress(json_lines({"text": "six"})) + zstandard.compress(json_lines({"text": "seven"}))
    (folder / "e.jsonl.zst").write_bytes(two_frames)
    (folder / "f.txt.zst").write_bytes(zstandard.compress(b"eight"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["nine", None], "n": [1, 2]}), folder / "g.parquet")
    (folder / "ignored.bin").write_bytes(b"\xff")
    (folder / ".hidden.txt").write_text("hidden")
    return folder


EVERY_TEXT = {"one\r\n", "# two", "three = 3", "four\u2028still four", "five", "six", "seven", "eight", "nine"}


def test_a_folder_gives_every_kind_of_file(every_kind):
    assert texts(every_kind) == texts(str(every_kind)) == EVERY_TEXT


def test_files_may_be_given_one_by_one(every_kind):
    files = [file for file in every_kind.rglob("*") if file.is_file() and file.suffix != ".bin"]
    assert texts(files) == EVERY_TEXT | {"hidden"}
    assert texts(every_kind / "b.md") == {"# two"}


def test_order_is_that_of_the_texts_not_of_the_names(every_kind):
    files = [file for file in every_kind.rglob("[a-g]*") if file.is_file()]
    forwards, backwards = read_documents(files), read_documents(files[::-1])
    assert [document.text for document in forwards] == [document.text for document in backwards]


def test_duplicate_and_blank_documents_are_removed(tmp_path):
    for name, text in {"a.txt": "same", "b.txt": "same", "c.txt": "other", "d.txt": "", "e.txt": " \n"}.items():
        (tmp_path / name).write_text(text)
    assert sorted(document.text for document in read_documents(tmp_path)) == ["other", "same"]


def test_the_text_column_may_be_named(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "no", "body": "yes"}))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["no"], "body": ["also"]}), tmp_path / "b.parquet")
    assert texts(tmp_path, text_column="body") == {"yes", "also"}


def test_the_standard_library_without_its_tests():
    documents = read_documents("stdlib")
    root = Path(sysconfig.get_paths()["stdlib"])
    names = {str(Path(document.name).relative_to(root)) for document in documents}
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= names
    assert not [name for name in names if {"test", "tests", "site-packages", "lib2to3"} & set(Path(name).parts)]
    assert sum(len(document.text) for document in documents) > 5_000_000


def test_a_data_set_by_name(monkeypatch):
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split, datasets.are_progress_bars_disabled()))
        return datasets.Dataset.from_dict({"text": ["one", "two", None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bars_were_off = datasets.are_progress_bars_disabled()
    assert texts("somebody/texts:small", split="validation") == {"one", "two"}
    assert texts("texts") == {"one", "two"}
    assert asked == [("somebody/texts", "small", "validation", True), ("texts", None, "train", True)]
    assert datasets.are_progress_bars_disabled() == bars_were_off
    assert "body" in refused("texts", text_column="body")


def test_a_data_set_that_does_not_load_is_named(monkeypatch):
    def load_dataset(name, config, split):
        raise ValueError('Unknown split "train". Should be one of ["test"].\nmore')

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refused("somebody/texts")
    assert message.startswith("somebody/texts: ")
    assert 'Unknown split "train"' in message


def test_what_is_missing_is_named(tmp_path):
    for missing in (tmp_path / "none", str(tmp_path / "none"), "./none", "none.txt", "a/b/c"):
        assert refused(missing) == f"{missing}: there is no such file or folder"


def test_an_empty_corpus_is_refused(tmp_path):
    assert str(tmp_path) in refused(tmp_path)
    assert ".parquet" in refused(tmp_path)
    (tmp_path / "blank.txt").write_text(" ")
    assert str(tmp_path) in refused(tmp_path)
    assert "no source" in refused([])


def test_a_file_of_unknown_kind_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    assert "a.pdf: cannot tell what it holds; give files that end in .txt" in refused(tmp_path / "a.pdf")


def test_an_unreadable_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("a")

    def denied(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", denied)
    assert "a.txt: cannot be read: Permission denied" in refused(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.zst"])
def test_undecodable_bytes_are_named_with_their_offset(tmp_path, name):
    data = "é: ".encode() + b"\xff"
    (tmp_path / name).write_bytes(zstandard.compress(data) if name.endswith("zst") else data)
    assert f"{name}: byte 0xff at offset 4 is not UTF-8" in refused(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": ', "not a line of JSON"),
        (b"[" * 200_000, "not a line of JSON"),
        (b'"text"', "give one JSON object a line"),
        (b'{"body": "b", "id": 1}', "no column 'text'; text_column may be body, id"),
        (b"{}", "no column 'text'; text_column may be none here"),
        (b'{"text": 3}', "column 'text' holds int, not text"),
        (b'{"text": "ab\\ud800"}', "character 2 is half of a surrogate pair"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "fine"}) + b"\n" + line + b"\n")
    message = refused(tmp_path)
    assert f"a.jsonl:3: {reason}" in message


@pytest.mark.parametrize("kept", [0.3, 0.9])
def test_truncated_zstd_is_refused(tmp_path, kept):
    data = zstandard.compress(os.urandom(400_000).hex().encode())
    (tmp_path / "a.txt.zst").write_bytes(data[: int(len(data) * kept)])
    assert "a.txt.zst: the zstd data is truncated" in refused(tmp_path)


def test_what_is_not_zstd_or_parquet_is_refused(tmp_path):
    (tmp_path / "a.txt.zst").write_text("plain text")
    assert "a.txt.zst: not readable as zstd" in refused(tmp_path / "a.txt.zst")
    (tmp_path / "b.parquet").write_text("plain text")
    assert "b.parquet: cannot be read as parquet" in refused(tmp_path / "b.parquet")


def test_a_table_without_text_is_refused(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"body": ["b"]}), tmp_path / "a.parquet")
    assert "a.parquet: no column 'text'; text_column may be body" in refused(tmp_path)
    assert "a.parquet, row 0: column 'text' holds int" in refused_table(tmp_path, pyarrow.array([1]))
    not_text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"a\xff")]
    )
    assert "a.parquet: column 'text' holds bytes that are not UTF-8" in refused_table(tmp_path, not_text)


def refused_table(folder, column) -> str:
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), folder / "a.parquet")
    return refused(folder)


def many(count: int) -> list[Document]:
    return [Document(f"{number}", f"document {number} " * (number % 17 + 1)) for number in range(count)]


def test_the_split_depends_on_texts_alone():
    documents = many(200)
    renamed = [Document("other", document.text) for document in reversed(documents)]
    held_out = {document.text for document in split_documents(documents, 0.05)[1]}
    assert {document.text for document in split_documents(renamed, 0.05)[1]} == held_out
    # SHA-256 of the text and nothing else decides, so these are the same on every machine and in every run
    small = [Document("", text) for text in ("a", "b", "c", "d", "e", "f", "g", "h", "i", "j")]
    assert {document.text for document in split_documents(small, 0.2)[1]} == {"d", "j"}


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_the_split_keeps_every_document_once_and_the_fraction(fraction):
    documents = many(500)
    train, validation = split_documents(documents, fraction)
    assert sorted(d.name for d in train + validation) == sorted(d.name for d in documents)
    characters = sum(len(d.text) for d in documents)
    assert sum(len(d.text) for d in validation) / characters == pytest.approx(fraction, rel=0.05)


def test_few_long_documents_hold_out_the_shortest_and_one_its_end():
    books = [Document("a", "a" * 1000), Document("b", "b" * 900), Document("c", "c" * 1100)]
    train, validation = split_documents(books, 0.05)
    assert [d.name for d in validation] == ["b"]
    assert sorted(d.name for d in train) == ["a", "c"]
    (head,), (end,) = split_documents([Document("a", "x" * 95 + "y" * 5)], 0.05)
    assert (head.text, end.text) == ("x" * 95, "y" * 5)


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 5, float("nan")])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(InputError, match="validation_fraction="):
        split_documents(many(3), fraction)


def test_a_document_on_both_sides_is_named():
    train = [Document("train/a.txt", "same"), Document("train/b.txt", "one")]
    check_disjoint(train, [Document("val/a.txt", "two")])
    with pytest.raises(InputError, match=r"val/c\.txt is in the training text too, as train/a\.txt"):
        check_disjoint(train, [Document("val/a.txt", "two"), Document("val/c.txt", "same")])


def test_overlap_is_the_share_of_held_out_runs_that_were_trained_on():
    words = [f"w{i}" for i in range(40)]
    train = [Document("a", " ".join(words[:20])), Document("b", "  \n".join(words[20:]))]
    assert overlap(train, [Document("c", " ".join(words[:13]))]) == 1.0  # one run of 13, which is there
    assert overlap(train, [Document("c", " ".join(words[:14])), Document("d", " ".join(reversed(words)))]) == 2 / 30
    assert overlap(train, [Document("c", " ".join(words[14:26]))]) == 0.0  # shorter than a run
    assert overlap(train, [Document("c", " ".join(words[14:27]))]) == 0.0  # over the seam of two documents
