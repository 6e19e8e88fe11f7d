"""Runs of every stage: what they save, and what they refuse before the first step."""

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model, load_tokenizer
from parscale.train.data import PackedText
from parscale.train.folder import check_output
from parscale.train.trainer import StreamsTrainer, train
from parscale.utils.files import UNFINISHED
from tests.train.conftest import run

STREAMS = StreamsConfig(2, 8, diversify=("prefix", "embedding"))


def test_pretraining_learns_and_saves_a_model_that_transformers_loads(base: Path) -> None:
    record = json.loads((base / "train.json").read_text())["result"]
    assert record["validation_loss"] < record["start_loss"] - 0.5
    assert record["tokens"] == 40 * 256
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    ids = tokenizer("import os", return_tensors="pt").input_ids
    assert torch.isfinite(model(ids).logits).all()


def test_a_model_is_gone_on_with_in_its_own_tokens(base: Path, text: PackedText) -> None:
    """Its tokenizer reads as it did in training, though transformers would give a qwen2 model another one."""
    words = "class _Name:  # it's 2024\n\tdef f(self): return 12345 + x_1"
    assert load_tokenizer(base)(words)["input_ids"] == text.tokenizer(words)["input_ids"]


@pytest.mark.parametrize("stage", ["retrofit", "frozen"])
def test_streams_are_added_to_a_trained_model(stage: str, base: Path, text: PackedText, tmp_path: Path) -> None:
    result = train(run(stage, tmp_path / "out", model=str(base), streams=STREAMS, tokens=20 * 256), data=text)
    assert result.validation_loss < result.start_loss
    assert result.probe is not None
    assert len(result.probe["weights"]) == 2
    saved, before = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    unchanged = all(torch.equal(saved[name], before[name]) for name in before)
    assert unchanged == (stage == "frozen")
    assert load_model(tmp_path / "out").streams == 2
    assert not list(tmp_path.glob(".*")), "nothing temporary may stay behind"


def test_the_log_tells_gradients_and_weights(base: Path, text: PackedText, tmp_path: Path) -> None:
    result = train(run("retrofit", tmp_path / "out", model=str(base), streams=STREAMS), data=text)
    logged = next(row for row in result.history if "loss" in row)
    assert {"gradients/backbone", "gradients/head", "gradients/streams", "streams/weight_1"} <= logged.keys()
    parts = [value for name, value in logged.items() if name.startswith("gradients/")]
    assert sum(part**2 for part in parts) ** 0.5 == pytest.approx(logged["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trained_model_uses_its_cache(checkpointing: bool, base: Path, text: PackedText, tmp_path: Path) -> None:
    settings = {"streams": STREAMS, "gradient_checkpointing": checkpointing}
    train(run("retrofit", tmp_path / "out", model=str(base), **settings), data=text)
    for folder in (base, tmp_path / "out"):
        output = load_model(folder)(input_ids=torch.as_tensor(text.validation[:2]["input_ids"]))
        assert output.past_key_values.get_seq_length() == 32


def test_a_run_is_repeatable_to_the_last_bit(base: Path, text: PackedText, tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(run("retrofit", tmp_path / name, model=str(base), streams=STREAMS), data=text)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_as_many_tokens_are_seen_as_are_told(
    base: Path, text: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several passes over a text whose blocks make no whole number of batches; and one with less than a batch."""
    seen: list[int] = []
    step = StreamsTrainer.training_step

    def watching(self: StreamsTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(inputs["input_ids"].numel())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(StreamsTrainer, "training_step", watching)
    for rows, batches in ((17, [8 * 32] * 8), (5, [5 * 32] * 12)):
        seen.clear()
        small = replace(text, train=text.train.select(range(rows)), train_tokens=rows * 32)
        config = run("retrofit", tmp_path / str(rows), model=str(base), tokens=8 * 256, validation_blocks=11)
        result = train(config, data=small)
        assert (seen, result.tokens) == (batches, sum(batches))
    whole = text.validation.select(range(11))
    ids = torch.stack([row["input_ids"] for row in whole])
    with torch.no_grad():
        expected = load_model(tmp_path / "5")(ids, labels=ids).loss.item()
    assert result.validation_loss == pytest.approx(expected, abs=1e-5)  # no row of the held-out text is left out


def test_another_seed_gives_another_model(base: Path, text: PackedText, tmp_path: Path) -> None:
    losses = {
        train(run("retrofit", tmp_path / str(seed), model=str(base), streams=STREAMS, seed=seed), data=text).start_loss
        for seed in (0, 1)
    }
    assert len(losses) == 2


def test_a_reparameterized_prefix_trains_and_is_folded_away(base: Path, text: PackedText, tmp_path: Path) -> None:
    streams = StreamsConfig(2, 4, prefix_init="reparameterized")
    result = train(run("frozen", tmp_path / "out", model=str(base), streams=streams, tokens=20 * 256), data=text)
    assert result.validation_loss < result.start_loss
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "generator" in name]
    model = load_model(tmp_path / "out").eval()
    ids = torch.as_tensor(text.validation[:16]["input_ids"])
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss.item() == pytest.approx(result.validation_loss, abs=1e-4)


def test_training_goes_on_from_a_model_that_has_streams(base: Path, text: PackedText, tmp_path: Path) -> None:
    train(run("frozen", tmp_path / "one", model=str(base), streams=STREAMS), data=text)
    again = train(run("retrofit", tmp_path / "two", model=str(tmp_path / "one")), data=text)
    assert again.streams == STREAMS.to_dict()
    with pytest.raises(InputError, match="has streams of its own"):
        train(run("retrofit", tmp_path / "three", model=str(tmp_path / "one"), streams=StreamsConfig(3)), data=text)
    with pytest.raises(InputError, match="has streams of its own"):  # asked for, though it is the default
        train(run("retrofit", tmp_path / "four", model=str(tmp_path / "one"), streams=StreamsConfig()), data=text)


def test_gradient_checkpointing_gives_the_same_model(base: Path, text: PackedText, tmp_path: Path) -> None:
    results = [
        train(
            run("retrofit", tmp_path / str(on), model=str(base), streams=STREAMS, gradient_checkpointing=on), data=text
        )
        for on in (False, True)
    ]
    assert results[0].validation_loss == pytest.approx(results[1].validation_loss, abs=1e-5)


def test_an_output_that_holds_something_is_refused(tmp_path: Path, text: PackedText) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not an empty folder"):
        train(run("pretrain", tmp_path), data=text)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unwritable_output_is_refused_before_any_work(tmp_path: Path, text: PackedText) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write there"):
        train(run("pretrain", tmp_path / "file" / "out"), data=text)


def test_a_full_disk_leaves_nothing_half_written(base, text, tmp_path, monkeypatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(text.tokenizer), "save_pretrained", full)
    with pytest.raises(InputError, match="No space left"):
        train(run("pretrain", tmp_path / "out"), data=text)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(base, text, tmp_path, monkeypatch) -> None:
    small = _model_with_vocabulary(len(text.tokenizer) - 1)
    monkeypatch.setattr("parscale.train.model.load_model", lambda name, **options: small)
    with pytest.raises(InputError, match="embeddings for"):
        train(run("retrofit", tmp_path / "out", model=str(base), streams=STREAMS), data=text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": 10}, "tokens=10"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"warmup": 0.9, "decay": 0.9}, "warmup=0.9"),
        ({"learning_rate": 0.0, "stream_learning_rate": 0.0}, "nothing would train"),
        ({"model": "no-such-shape/nowhere"}, "no-such-shape"),
    ],
)
def test_bad_settings_are_named(changes: dict, named: str, text: PackedText, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        train(run("pretrain", tmp_path / "out", **changes), data=text)
    assert not list(tmp_path.iterdir())


def _model_with_vocabulary(size: int):
    from transformers import Qwen2Config

    return AutoModelForCausalLM.from_config(
        Qwen2Config(vocab_size=size, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )


def test_half_a_model_that_a_kill_left_is_no_obstacle(tmp_path: Path) -> None:
    partial = tmp_path / "out" / UNFINISHED
    partial.mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"half")
    check_output(tmp_path / "out")
    assert not partial.exists()


@pytest.mark.parametrize(
    ("stage", "rate", "said"), [("retrofit", 0.1, True), ("retrofit", 3e-3, False), ("frozen", 0.1, False)]
)
def test_a_rate_that_would_ruin_a_model_is_told(
    stage: str, rate: float, said: bool, base: Path, text: PackedText, tmp_path: Path, capsys: Any
) -> None:
    """The model is 64 wide; a frozen one has nothing to ruin."""
    train(run(stage, tmp_path / "out", model=str(base), streams=STREAMS, tokens=256, learning_rate=rate), data=text)
    line = "learning_rate=0.1 is high for a model 64 wide: from scratch about 0.01 does best"
    assert (line in capsys.readouterr().err) == said
