"""The pilot on a tiny model that the test trains: honest controls, a LoRA of equal size, and a plain verdict."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.evaluate.perplexity import DocumentLosses
from parscale.experiments.pilot import FEW_STEPS, PilotRow, _held_out, _row, compare, judge, run_pilot
from parscale.load import load_model, load_tokenizer
from parscale.train.config import TrainConfig
from parscale.train.corpus import Document
from parscale.train.data import train_tokenizer
from parscale.train.faults import command_to_resume
from parscale.train.shapes import build
from parscale.train.trainer import train
from tests.corpora import write_corpus

FAR = {"P=4": (0.1, 0.05, 0.2)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with its tokenizer, not trained."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer(["def f(x): return x\n"], 300)
    build("pico", tokenizer, 64).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def row(gain: float, low: float, high: float, name: str = "P=4") -> PilotRow:
    return PilotRow(name, 3.0, gain, low, high, 10, True, 1.5, 1.0)


@pytest.mark.parametrize(
    ("rows", "over_lora", "documents", "answer"),
    [
        ([row(0.2, 0.1, 0.3)], FAR, 20, "Yes: P=4 gains +0.2000"),
        ([row(0.2, 0.1, 0.3)], {"P=4": (-0.1, -0.2, -0.05)}, 20, "No, take the LoRA"),
        ([row(0.2, 0.1, 0.3)], {"P=4": (0.0, -0.2, 0.2)}, 20, "Undecided"),
        ([row(-0.2, -0.3, -0.1)], FAR, 20, "No: "),
        ([row(0.2, -0.1, 0.3)], FAR, 20, "Undecided"),
        ([row(0.2, 0.1, 0.3)], FAR, 3, "Undecided: held-out documents are too few (3)"),
        ([row(0.1, 0.05, 0.2, "P=2"), row(0.2, 0.1, 0.3)], FAR | {"P=2": (0.0, 0.0, 0.0)}, 20, "Yes: P=4"),
    ],
)
def test_the_verdict(rows: list[PilotRow], over_lora: dict, documents: int, answer: str) -> None:
    assert judge(rows, over_lora, documents, 1000).startswith(answer)


def test_a_few_steps_decide_nothing() -> None:
    assert judge([row(0.2, 0.1, 0.3)], FAR, 20, 99).startswith("Undecided: 99 steps")


def test_a_gain_over_documents_weighs_them_by_their_tokens() -> None:
    tokens = np.array([10, 30, 60])
    ours, theirs = (DocumentLosses(np.array(nats), tokens, []) for nats in ([20.0, 60, 120], [30.0, 75, 126]))
    gain, low, high = compare(ours, theirs)
    assert gain == pytest.approx((10 + 15 + 6) / 100)
    assert (low, high) == (pytest.approx(0.1, abs=0.02), pytest.approx(1.0, abs=0.02))
    assert math.isnan(compare(*(DocumentLosses(one.nats[:1], tokens[:1], []) for one in (ours, theirs)))[1])


def test_losses_are_compared_at_the_same_steps() -> None:
    """A run may have more evaluations than another one; what grows is the gain at steps that both have."""
    losses = {name: DocumentLosses(np.ones(5), np.ones(5), []) for name in ("control", "P=2")}
    curves = {"control": {2: 3.0, 3: 9.0, 4: 2.8}, "P=2": {2: 2.9, 4: 2.5}}
    results = {
        name: SimpleNamespace(
            stream_parameters=1, history=[{"step": step, "eval_loss": loss} for step, loss in curve.items()]
        )
        for name, curve in curves.items()
    }
    assert _row("P=2", losses, results, {}).growing


def test_long_documents_do_not_take_all_the_tokens(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty documents, each long enough for all: an interval needs many."""
    monkeypatch.setattr("parscale.experiments.pilot.HELD_OUT_TOKENS", 2000)
    documents = [Document(str(number), f"{number} " + "def f(x): return x\n" * 400) for number in range(20)]
    found = _held_out(load_model(base), load_tokenizer(base), documents, 64)
    assert len(found.tokens) == 20
    assert set(found.tokens) == {100 - 2}  # of a hundred tokens each, in two pieces


@pytest.mark.parametrize(("verb", "flag"), [("train", " --resume"), ("pilot", ""), ("experiment", "")])
def test_what_to_type_after_a_stop_is_a_command_that_is_there(
    verb: str, flag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/bin/parscale", verb, "x"])
    assert command_to_resume() == f"parscale {verb} x{flag}"


@pytest.mark.slow
def test_a_pilot_on_a_real_small_llama(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """260 thousand weights that learnt children's stories, on medical answers: it decides, and names its numbers."""
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("parscale.experiments.pilot.LEAST_STEPS", FEW_STEPS)
    name, data = shared / "data/models/stories260K", shared / "data/corpora/biomed_medquad.validation.jsonl.zst"
    options = {"minutes": 0.01, "out": tmp_path / "out", "block_size": 64, "batch_size": 8}
    record = run_pilot(str(name), data=(str(data),), **options)  # type: ignore[arg-type]
    rows = {entry["name"]: entry for entry in record["rows"]}
    assert rows["control"]["loss"] < record["loss_before"]
    for label, most in (("P=2", 2), ("P=4", 4)):
        assert rows[label]["low"] < rows[label]["gain"] < rows[label]["high"]
        assert 1 < rows[label]["memory_ratio"] < most
        assert rows[label]["latency_ratio"] > 0.5
    assert record["verdict"].split(":")[0].split(",")[0] in ("Yes", "No", "Undecided")


@pytest.mark.slow
def test_a_pilot_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARSCALE_CACHE", str(tmp_path / "cache"))
    data = (str(write_corpus(tmp_path / "corpus")),)
    plain = StreamsConfig(1, 0)
    settings = {"data": data, "vocab_size": 384, "block_size": 32, "batch_size": 8, "tokens": 5 * 256}
    train(TrainConfig("pretrain", tmp_path / "base", "pico", plain, evaluations=1, **settings))  # type: ignore[arg-type]
    base, out = str(tmp_path / "base"), tmp_path / "out"
    record = run_pilot(base, data=data, minutes=0.01, out=out, block_size=32, batch_size=8)
    rows = {entry["name"]: entry for entry in record["rows"]}
    assert list(rows) == ["control", "P=2", "P=4", "LoRA"]
    assert rows["LoRA"]["parameters"] == pytest.approx(rows["P=4"]["parameters"], rel=0.1)
    assert rows["P=4"]["gain"] == pytest.approx(rows["control"]["loss"] - rows["P=4"]["loss"])
    assert rows["P=4"]["latency_ratio"] > 0
    assert record["verdict"].startswith("Undecided: held-out documents are too few (1)")
    assert json.loads((out / "pilot.json").read_text())["steps"] == record["steps"]
    again = run_pilot(base, data=data, minutes=0.01, out=out, block_size=32, batch_size=8)
    assert [entry["loss"] for entry in again["rows"]] == [entry["loss"] for entry in record["rows"]]
    assert again["steps"] == record["steps"]  # what has ended is not run again
    with pytest.raises(InputError, match=r"holds a pilot with data=.*give another out"):
        run_pilot(base, data=(*data, *data), out=out, block_size=32)
    with pytest.raises(InputError, match=r"holds a pilot with minutes=0\.01, not 5; give another out"):
        run_pilot(base, data=data, minutes=5, out=out, block_size=32, batch_size=8)
    (tmp_path / "corpus" / "new.py").write_text("import os\n" * 400)
    with pytest.raises(InputError, match=r"holds a pilot on another text than data=.*; give another out"):
        run_pilot(base, data=data, minutes=0.01, out=out, block_size=32, batch_size=8)
    with pytest.raises(InputError, match="not an empty folder"):
        run_pilot(base, data=data, out=tmp_path / "base")
