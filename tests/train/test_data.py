import errno
import multiprocessing
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, PreTrainedTokenizerBase, default_data_collator

from parscale.errors import InputError
from parscale.train import data
from parscale.train.config import TrainConfig
from parscale.train.data import END_OF_TEXT, load_text, train_tokenizer
from parscale.train.prepare import prepare

UNICODE = [
    "".join(map(chr, range(0x300))),
    "\0\r\n \u2028 \ufeff tab\t  spaces   \n\n\n",
    "naïve e\u0301 שלום 漢字 👩\u200d👩\u200d👧 \U0010ffff \ue000 \ufffd",
    f"a text that says {END_OF_TEXT} in its middle",
]


def sentence(number: int) -> str:
    return f"Document {number}: " + " ".join(f"word{(number * step) % 97}" for step in range(1, 40)) + ".\n"


@pytest.fixture
def corpus(tmp_path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(sentence(number))
    return folder


@pytest.fixture
def load(corpus, tmp_path):
    """`load_text` with small sizes and a cache of the test's own."""
    defaults = {"source": corpus, "cache_dir": tmp_path / "cache", "block_size": 16, "vocab_size": 400}
    return lambda **options: load_text(**(defaults | options))


@pytest.fixture
def tokenised(monkeypatch) -> list[str]:
    """What was tokenised and trained on: empty where the cache served."""
    calls = []
    tokenize, train = data._tokenize, data.train_tokenizer
    monkeypatch.setattr(data, "_tokenize", lambda *args: calls.append("tokens") or tokenize(*args))
    monkeypatch.setattr(data, "train_tokenizer", lambda *args: calls.append("tokenizer") or train(*args))
    return calls


def refused(call, **options) -> str:
    with pytest.raises(InputError) as raised:
        call(**options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def tokens_of(dataset) -> list[int]:
    return dataset["input_ids"][:].flatten().tolist()


def entries(tmp_path) -> list[Path]:
    return list((tmp_path / "cache" / "tokens").iterdir())


def same_text(one, other) -> bool:
    blocks = zip((one.train, one.validation), (other.train, other.validation))
    return one.fingerprint == other.fingerprint and all(tokens_of(a) == tokens_of(b) for a, b in blocks)


def test_blocks_decode_to_the_documents_with_one_end_of_text_after_each(load, corpus):
    packed = load(validation_fraction=0.2)
    found = ""
    for dataset, tokens in ((packed.train, packed.train_tokens), (packed.validation, packed.validation_tokens)):
        ids = tokens_of(dataset)
        assert len(ids) == tokens == len(dataset) * 16
        found += packed.tokenizer.decode(ids) + "\n"
    whole = found.replace("\n", END_OF_TEXT).split(END_OF_TEXT)
    texts = {file.read_text().rstrip("\n") for file in corpus.iterdir()}
    assert len(texts & set(whole)) >= 58  # but for the documents that a dropped remainder cut
    assert packed.train_documents + packed.validation_documents == 60
    assert found.count(END_OF_TEXT) >= 58


def test_only_the_remainder_is_dropped(load, corpus):
    packed, longer = load(), load(block_size=17)
    tokenizer = packed.tokenizer
    documents = data.read_documents(corpus)
    train, _ = data.split_documents(documents, 0.05)
    stream = [token for document in train for token in [*tokenizer.encode(document.text), tokenizer.eos_token_id]]
    assert tokens_of(packed.train) == stream[: len(stream) // 16 * 16]
    assert tokens_of(longer.train) == stream[: len(stream) // 17 * 17]


def test_rows_are_what_the_trainer_takes(load):
    packed = load()
    batch = next(iter(DataLoader(packed.train, batch_size=4, collate_fn=default_data_collator)))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (4, 16)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])


@pytest.mark.parametrize("text", UNICODE)
def test_a_trained_tokenizer_decodes_every_text_to_itself(text):
    tokenizer = train_tokenizer(["print('hello')\n", "some text"], 300)
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 300
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == tokenizer.pad_token_id


def test_a_trained_tokenizer_saves_with_the_model(load, tmp_path):
    tokenizer = load().tokenizer
    tokenizer.save_pretrained(tmp_path / "model")
    again = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in UNICODE:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert again.decode(again(text)["input_ids"]) == text
    assert again.eos_token == again.pad_token == END_OF_TEXT


def test_a_text_that_spells_the_end_of_text_does_not_end_its_document(load, tmp_path):
    (tmp_path / "one.txt").write_text(f"before {END_OF_TEXT} after. " * 40)
    packed = load(source=tmp_path / "one.txt", validation=tmp_path / "corpus")
    assert packed.tokenizer.eos_token_id not in tokens_of(packed.train)[:-1]
    assert packed.tokenizer.decode(tokens_of(packed.train)).startswith(f"before {END_OF_TEXT} after. before")


def test_long_texts_are_tokenised_in_pieces_that_lose_nothing(load, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "_PIECE", 50)
    text = "".join(sentence(number) for number in range(20)) + "no line ends here " * 20
    (tmp_path / "long.txt").write_text(text)
    packed = load(source=tmp_path / "long.txt", validation=tmp_path / "corpus", block_size=2)
    read = packed.tokenizer.decode(tokens_of(packed.train))
    assert read.removesuffix(END_OF_TEXT) in (text, text[:-1])
    assert read.count(END_OF_TEXT) <= 1
    assert "".join(data._pieces(text)) == text
    assert max(map(len, data._pieces(text))) <= 50


def test_a_given_tokenizer_is_used_by_folder_or_as_an_object(load, tmp_path, tokenised):
    other = train_tokenizer([sentence(number) for number in range(100)], 700)
    other.save_pretrained(tmp_path / "tokenizer")
    by_object, by_folder = load(tokenizer=other), load(tokenizer=str(tmp_path / "tokenizer"))
    assert by_object.tokenizer is other
    assert isinstance(by_folder.tokenizer, PreTrainedTokenizerBase)
    assert same_text(by_object, by_folder)
    assert tokenised == ["tokens", "tokens"]
    assert load().fingerprint != by_object.fingerprint
    other(["a", "longer text"], padding=True, truncation=True, max_length=3)  # leaves both on in the backend
    assert same_text(by_object, load(tokenizer=other))


def test_a_given_tokenizer_that_begins_every_text_does_not_in_the_blocks(load):
    plain, template = (train_tokenizer(["some text"], 300) for _ in range(2))
    template.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, template.eos_token_id)]
    )
    assert template("a")["input_ids"] == [template.eos_token_id, *plain("a")["input_ids"]]
    assert tokens_of(load(tokenizer=template).train) == tokens_of(load(tokenizer=plain).train)


def test_a_tokenizer_that_cannot_serve_is_refused(load, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"tokenizer '{tmp_path / 'empty'}' cannot be loaded" in refused(load, tokenizer=tmp_path / "empty")
    endless = train_tokenizer(["a"], 257)
    endless.eos_token = None
    assert "it has no end-of-text token" in refused(load, tokenizer=endless)


def test_the_tokenizer_never_sees_the_validation_text(load, tmp_path):
    (tmp_path / "val.txt").write_text("zyzzyvazyzzyva " * 100)
    assert not [token for token in load(validation=tmp_path / "val.txt").tokenizer.get_vocab() if "zyz" in token]


def test_an_explicit_validation_source_is_taken_whole(load, corpus, tmp_path):
    (tmp_path / "val.txt").write_text("held out. " * 50)
    packed = load(validation=tmp_path / "val.txt")
    assert (packed.train_documents, packed.validation_documents) == (60, 1)
    assert packed.tokenizer.decode(tokens_of(packed.validation)).startswith("held out. held out. ")


def test_a_training_document_in_the_validation_source_is_refused(load, corpus, tmp_path):
    shutil.copy(corpus / "7.txt", tmp_path / "val.txt")
    message = refused(load, validation=tmp_path / "val.txt")
    assert str(tmp_path / "val.txt") in message
    assert str(corpus / "7.txt") in message


def test_held_out_text_that_was_trained_on_is_told(load, corpus, tmp_path, capsys):
    (tmp_path / "val.txt").write_text((corpus / "7.txt").read_text() + "and an end of its own")
    for _ in ("tokenised", "from the cache"):
        assert load(validation=tmp_path / "val.txt").overlap == pytest.approx(29 / 35)  # of 47 words, 41 are of 7.txt
    config = TrainConfig(
        "pretrain", tmp_path / "out", "pico", data=(str(corpus),), validation=(str(tmp_path / "val.txt"),),
        cache_dir=tmp_path / "cache", block_size=16, vocab_size=400,
    )  # fmt: skip
    prepare(config)
    assert capsys.readouterr().err.startswith("parscale: 83% of the held-out text")
    (tmp_path / "val.txt").write_text("held out. " * 50)
    prepare(config)
    assert capsys.readouterr().err == ""


def test_a_limit_keeps_the_first_tokens_and_stops_there(load, monkeypatch):
    everything = load()
    monkeypatch.setattr(data, "_PIECE", 500)
    seen = []
    batches = data._batches
    monkeypatch.setattr(
        data, "_batches", lambda documents: (seen.append(batch) or batch for batch in batches(documents))
    )
    limited = load(max_train_tokens=200, tokenizer=everything.tokenizer)
    assert limited.train_tokens == 192
    assert tokens_of(limited.train) == tokens_of(everything.train)[:192]
    assert tokens_of(limited.validation) == tokens_of(everything.validation)
    assert sum(len(text) for texts, _ in seen for text in texts) < 10_000


def test_the_second_time_tokens_come_from_the_cache(load, tokenised, corpus, tmp_path):
    first = load()
    assert tokenised == ["tokenizer", "tokens", "tokens"]
    moved = corpus.rename(tmp_path / "moved")
    second = load(source=moved)
    assert len(tokenised) == 3
    assert same_text(first, second)
    assert second.tokenizer.get_vocab() == first.tokenizer.get_vocab()
    assert load(source=moved, block_size=32).fingerprint != first.fingerprint
    assert len(tokenised) == 3
    assert len(entries(tmp_path)) == 1


def test_the_cache_tells_apart_whatever_gives_other_tokens(load, tokenised, corpus, monkeypatch):
    fingerprints = {load().fingerprint, load(vocab_size=300).fingerprint, load(max_train_tokens=160).fingerprint}
    fingerprints.add(load(validation_fraction=0.2).fingerprint)
    (corpus / "0.txt").write_text("another text, now. " * 20)
    fingerprints.add(load().fingerprint)
    monkeypatch.setattr(data, "FORMAT", data.FORMAT + 1)
    fingerprints.add(load().fingerprint)
    assert len(fingerprints) == 6
    assert tokenised.count("tokenizer") == 6


def test_the_cache_folder_follows_the_environment(load, tmp_path, monkeypatch):
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "named"))
    load(cache_dir=None)
    assert len(list((tmp_path / "named" / "tokens").iterdir())) == 1
    monkeypatch.delenv("PARSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load(cache_dir=None)
    assert len(list((tmp_path / "xdg" / "parscale" / "tokens").iterdir())) == 1


@pytest.mark.parametrize(
    "damage",
    [lambda content: content[:-100], lambda content: content[:10], lambda content: b"", lambda content: b"\0" * 5000],
)
def test_a_damaged_entry_is_rebuilt(load, tokenised, tmp_path, damage):
    first = load()
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert same_text(first, load())
    assert len(tokenised) == 6
    assert entries(tmp_path) == [entry]
    assert entry.read_bytes() == whole


def test_one_flipped_bit_anywhere_is_noticed(load, tokenised, tmp_path):
    load()
    (entry,) = entries(tmp_path)
    whole = entry.read_bytes()
    for place in range(0, len(whole), len(whole) // 40):
        damaged = bytearray(whole)
        damaged[place] ^= 1
        entry.write_bytes(damaged)
        assert data._load(entry) is None, place


def test_another_writer_between_writing_and_renaming_does_no_harm(load, tmp_path, monkeypatch):
    replace = Path.replace
    others = []

    def replace_after_another_writer(path, target):
        if not others:
            others.append(None)
            others[0] = load()
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_after_another_writer)
    one = load()
    assert same_text(one, others[0])
    assert same_text(one, load())
    assert len(entries(tmp_path)) == 1


def load_when_all_are_ready(barrier, results, corpus, cache):
    barrier.wait()
    packed = load_text(corpus, cache_dir=cache, block_size=16, vocab_size=400)
    results.put((packed.fingerprint, tokens_of(packed.train)))


@pytest.mark.slow
def test_two_processes_at_once_leave_one_whole_entry(load, corpus, tmp_path, tokenised):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (barrier, results, corpus, tmp_path / "cache")
    processes = [context.Process(target=load_when_all_are_ready, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    (one, other) = (results.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    assert one == other
    assert len(entries(tmp_path)) == 1
    assert (load().fingerprint, tokens_of(load().train)) == one
    assert tokenised == []


@pytest.fixture
def full_disk(tmp_path):
    """A file system of 64 KiB."""
    folder = tmp_path / "full"
    folder.mkdir()
    if shutil.which("mount") is None or os.getuid() != 0:
        pytest.skip("mounting a small file system takes root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small file system: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_named_and_left_clean(load, full_disk, tmp_path):
    (tmp_path / "corpus" / "long.txt").write_text("".join(sentence(number) for number in range(500)))
    message = refused(load, cache_dir=full_disk)
    assert f"cache folder {full_disk / 'tokens'}: cannot be written: No space left on device" in message
    assert list((full_disk / "tokens").iterdir()) == []


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_write_that_fails_is_named_and_left_clean(load, tmp_path, monkeypatch, method):
    def fail(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, method, fail)
        message = refused(load)
    assert f"cache folder {tmp_path / 'cache' / 'tokens'}: cannot be written: No space left on device" in message
    assert entries(tmp_path) == []
    load()
    assert len(entries(tmp_path)) == 1


def test_a_cache_folder_that_cannot_be_made_is_named_before_the_work(load, tmp_path, tokenised):
    (tmp_path / "file").write_text("")
    message = refused(load, cache_dir=tmp_path / "file")
    assert f"cache folder {tmp_path / 'file' / 'tokens'}: cannot be written" in message
    assert "another cache_dir" in message
    assert tokenised == []


def test_too_little_text_is_refused(load, corpus, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("short")
    assert f"the training text ({short}) has" in refused(load, source=short, validation=corpus)
    message = refused(load, validation=short)
    assert f"the validation text ({short}) has" in message
    assert "fewer than one block of 16: give more text or a smaller block_size" in message
    assert f"the validation text (0.05 of {corpus}) has" in refused(load, block_size=2000)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"block_size": 1}, "block_size=1: give at least 2"),
        ({"vocab_size": 256}, "vocab_size=256: give at least 257"),
        ({"max_train_tokens": 15}, "max_train_tokens=15: give at least one block of 16"),
        ({"validation_fraction": 0}, "validation_fraction=0"),
    ],
)
def test_sizes_that_cannot_serve_are_refused(load, options, reason):
    assert reason in refused(load, **options)


def test_the_smallest_vocabulary_serves(load):
    assert len(load(vocab_size=257).tokenizer) == 257


@pytest.mark.skipif("PARSCALE_SHARED" not in os.environ, reason="PARSCALE_SHARED, a folder of corpora, is not set")
def test_a_real_corpus_in_compressed_json_lines(tmp_path):
    folder = Path(os.environ["PARSCALE_SHARED"]) / "data" / "corpora"
    packed = load_text(
        folder / "prose_openstax.train.jsonl.zst",
        validation=folder / "prose_openstax.validation.jsonl.zst",
        max_train_tokens=100_000,
        cache_dir=tmp_path,
    )
    assert (packed.train_documents, packed.validation_documents) == (271, 10)
    assert packed.train_tokens == 100_000 // 256 * 256
