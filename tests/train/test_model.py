"""Models of a run: a LoRA under the streams, a quantised backbone, and every stage from every other."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import parscale
from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.load import load_model, load_tokenizer
from parscale.streams.tensors import belongs_to_streams
from parscale.train import model as model_module
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText
from parscale.train.model import base_of, model_of
from parscale.train.prepare import tokenizer_of
from parscale.train.trainer import train
from tests.small import build
from tests.train.conftest import run
from tests.train.test_sft import capitals, write

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for the old name

STREAMS = StreamsConfig(4, 4, diversify=("prefix", "lora"), lora_rank=2)


@pytest.fixture
def ids(text: PackedText) -> Tensor:
    return torch.as_tensor(text.validation[:2]["input_ids"])


@torch.no_grad()
def logits(model, ids: Tensor) -> Tensor:
    return model.eval()(input_ids=ids).logits


def trained_names(model) -> set[str]:
    """What kinds of parameters have a gradient to come."""
    return {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}


@pytest.fixture(scope="module")
def with_lora(base: Path, text: PackedText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lora") / "out"
    config = run("retrofit", output, model=str(base), streams=STREAMS, peft="lora", peft_rank=2, tokens=40 * 256)
    result = train(config, data=text)
    assert result.validation_loss < result.start_loss
    return output


def test_a_lora_leaves_the_backbone_and_trains_the_streams_whole(base: Path, text: PackedText, ids: Tensor) -> None:
    config = run("retrofit", Path("out"), model=str(base), streams=STREAMS, peft="lora")
    model = model_of(config, text.tokenizer, ids)
    assert base_of(model).streams == 4
    assert trained_names(model) == {"prefix_k", "prefix_v", "stream_lora_a", "stream_lora_b", "weight", "bias"}
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(any(part in name for part in ("lora_", "prefix_", "aggregate_layer")) for name in trained)
    assert not [name for name in trained if "aggregate_layer" in name and "lora_" in name]


def test_streams_and_lora_lie_beside_each_other_and_give_the_same_logits(
    with_lora: Path, base: Path, ids: Tensor, text: PackedText, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_the_end = []
    save = model_module.save_model

    def look_and_save(model, *more) -> None:
        at_the_end.append(logits(model, ids))
        save(model, *more)

    monkeypatch.setattr("parscale.train.folder.save_model", look_and_save)
    config = run("retrofit", tmp_path / "again", model=str(base), streams=STREAMS, peft="lora", peft_rank=2)
    train(config, data=text)
    files = {file.name for file in (tmp_path / "again").iterdir()}
    assert {"adapter_model.safetensors", "streams.safetensors", "streams.json"} <= files
    assert "model.safetensors" not in files

    loaded = parscale.load_streams(load_model(base), tmp_path / "again")
    loaded = PeftModel.from_pretrained(loaded, str(tmp_path / "again"))
    assert torch.equal(logits(loaded, ids), at_the_end[0])
    merged = load_model(tmp_path / "again")
    torch.testing.assert_close(logits(merged, ids), at_the_end[0], rtol=0, atol=2e-5)


def test_a_lora_on_a_model_that_has_streams_already(base: Path, text: PackedText, ids: Tensor, tmp_path: Path) -> None:
    train(run("retrofit", tmp_path / "p4", model=str(base), streams=STREAMS), data=text)
    result = train(
        run("retrofit", tmp_path / "out", model=str(tmp_path / "p4"), peft="lora", tokens=20 * 256), data=text
    )
    again = load_model(tmp_path / "out")
    assert again.streams == 4
    blocks = torch.as_tensor(text.validation[:16]["input_ids"])
    with torch.no_grad():
        assert again(input_ids=blocks, labels=blocks).loss.item() == pytest.approx(result.validation_loss, abs=1e-3)


def test_a_lora_alone_without_streams(base: Path, text: PackedText, ids: Tensor, tmp_path: Path) -> None:
    config = run("retrofit", tmp_path / "out", model=str(base), streams=StreamsConfig(1, 0), peft="lora")
    result = train(config, data=text)
    assert result.streams == StreamsConfig(1, 0).to_dict()
    assert not torch.equal(logits(load_model(tmp_path / "out"), ids), logits(load_model(base), ids))


def test_a_model_of_half_precision_trains_in_float32_unless_told(base: Path, text: PackedText, tmp_path: Path) -> None:
    load_model(base).bfloat16().save_pretrained(tmp_path / "half")
    load_tokenizer(base).save_pretrained(tmp_path / "half")
    assert load_model(tmp_path / "half").dtype == torch.bfloat16
    for dtype in ("float32", "bfloat16"):
        config = run("retrofit", tmp_path / dtype, model=str(tmp_path / "half"), streams=STREAMS, dtype=dtype)
        train(config, data=text)
        saved = load_file(tmp_path / dtype / "model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {getattr(torch, dtype)}


def test_streams_over_a_half_precision_backbone_take_small_steps(base: Path, text: PackedText, tmp_path: Path) -> None:
    streams = StreamsConfig(4, 4, diversify=("prefix", "embedding", "lora", "rank1"), lora_rank=2)
    settings = {"model": str(base), "streams": streams, "dtype": "bfloat16"}
    start = run("frozen", tmp_path / "start", **settings, stream_learning_rate=0.0)
    train(start, data=text)
    train(run("frozen", tmp_path / "out", **settings, stream_learning_rate=1e-5), data=text)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    added = {name for name, tensor in after.items() if tensor.dtype == torch.float32}
    assert {name for name, tensor in after.items() if tensor.dtype == torch.bfloat16} == after.keys() - added
    assert added == {name for name in after if belongs_to_streams(name)}
    for name in (name for name in added if name.endswith("prefix_v")):
        moved = (after[name] - before[name]).abs()
        assert 0 < moved.max() < 1e-3
    loaded = load_model(tmp_path / "out")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    ids = torch.as_tensor(text.validation[:1]["input_ids"])
    assert loaded.generate(ids, max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3


def test_training_goes_on_from_streams_and_lora(with_lora: Path, text: PackedText, tmp_path: Path) -> None:
    before = json.loads((with_lora / "train.json").read_text())["result"]["validation_loss"]
    result = train(run("frozen", tmp_path / "more", model=str(with_lora)), data=text)
    assert result.streams == STREAMS.to_dict()
    assert result.start_loss == pytest.approx(before, abs=1e-4)
    assert load_model(tmp_path / "more").streams == 4


def test_any_stage_goes_on_from_any_other(base: Path, text: PackedText, tmp_path: Path) -> None:
    """pretrain (the fixture, one stream) → retrofit to four → frozen → sft → retrofit."""
    pytest.importorskip("trl")
    chats = {"data": (write(tmp_path / "chats.jsonl", capitals(20)),), "chat_template": "plain", "block_size": 64}
    end = json.loads((base / "train.json").read_text())["result"]["validation_loss"]
    previous = base
    for number, stage in enumerate(("retrofit", "frozen", "sft", "retrofit")):
        settings: dict = {"streams": STREAMS} if number == 0 else {}
        settings |= {"tokens": 512} | chats if stage == "sft" else {}
        config = run(stage, tmp_path / str(number), model=str(previous), **settings)
        result = train(config, data=None if stage == "sft" else text)
        assert result.streams == STREAMS.to_dict()
        if stage == "frozen":
            assert result.start_loss == pytest.approx(end, abs=1e-4)
        end, previous = result.validation_loss, config.output
    assert load_model(previous).streams == 4


@pytest.fixture
def wide(text: PackedText, tmp_path: Path) -> str:
    """A folder with a model that is wide enough for groups of 4-bit values."""
    plain = build(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=len(text.tokenizer))
    plain.save_pretrained(tmp_path / "wide")
    text.tokenizer.save_pretrained(tmp_path / "wide")
    return str(tmp_path / "wide")


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_streams_over_a_quantised_backbone(bits: str, wide: str, text: PackedText, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    config = run("frozen", tmp_path / "out", model=wide, streams=STREAMS, quantize=bits, tokens=20 * 256)
    result = train(config, data=text)
    assert result.validation_loss < result.start_loss - 0.05
    assert {file.name for file in config.output.glob("*.safetensors")} == {"streams.safetensors"}
    assert all(t.isfinite().all() for t in load_file(config.output / "streams.safetensors").values())
    again = load_model(config.output)
    ids = torch.as_tensor(text.validation[:16]["input_ids"])
    with torch.no_grad():
        assert again(input_ids=ids, labels=ids).loss.item() == pytest.approx(result.validation_loss, abs=0.02)
    on = train(run("frozen", tmp_path / "on", model=str(config.output), quantize=bits), data=text)
    assert on.start_loss == pytest.approx(result.validation_loss, abs=0.02)
    assert load_model(tmp_path / "on").is_quantized
    with pytest.raises(InputError, match="give quantize, as it was trained with"):
        train(run("frozen", tmp_path / "whole", model=str(config.output)), data=text)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_streams_and_a_lora_over_a_quantised_backbone(bits: str, wide: str, text: PackedText, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    settings = {"streams": STREAMS, "quantize": bits, "tokens": 20 * 256, "peft": "lora", "peft_rank": 4}
    result = train(run("retrofit", tmp_path / "out", model=wide, **settings), data=text)
    assert result.validation_loss < result.start_loss - 0.05
    written = {file.name for file in (tmp_path / "out").glob("*.safetensors")}
    assert written == {"streams.safetensors", "adapter_model.safetensors"}
    again = load_model(tmp_path / "out")
    ids = torch.as_tensor(text.validation[:16]["input_ids"])
    with torch.no_grad():
        assert again(input_ids=ids, labels=ids).loss.item() == pytest.approx(result.validation_loss, abs=0.02)
        for name, parameter in again.named_parameters():
            if ".lora_B." in name:
                parameter.zero_()
        assert again(input_ids=ids, labels=ids).loss.item() > result.validation_loss + 0.05
    assert again.generate(ids[:1], max_new_tokens=3, do_sample=False).shape[1] == ids.shape[1] + 3
    with pytest.raises(InputError, match="it cannot be merged to train on"):
        train(run("frozen", tmp_path / "more", model=str(tmp_path / "out")), data=text)


def test_bits_for_adapters_that_have_their_base_are_refused(with_lora: Path, text: PackedText, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its base was in 'none' in training"):
        train(run("frozen", tmp_path / "out", model=str(with_lora), quantize="int8"), data=text)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"stage": "frozen", "peft": "lora"}, "for a LoRA too, take 'retrofit'"),
        ({"stage": "retrofit", "quantize": "int4"}, "few bits cannot be trained; take 'frozen'"),
        ({"stage": "pretrain", "peft": "lora"}, "there is no trained backbone; take 'retrofit'"),
        ({"stage": "retrofit", "seed": -1}, "seed=-1 is not accepted"),
        ({"stage": "pretrain", "quantize": "int4"}, "few bits cannot be trained; take 'frozen'"),
        ({"stage": "retrofit", "backbone_delay": 1.0}, "backbone_delay=1.0"),
        ({"stage": "retrofit", "patience": 0}, "patience=0"),
        ({"stage": "retrofit", "smooth_validation": 1.0}, "smooth_validation=1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        TrainConfig(output=Path("out"), **changes)


def test_a_tokenizer_of_another_vocabulary_is_refused(base: Path, tmp_path: Path) -> None:
    other = load_tokenizer(base)
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path / "other")
    config = run("retrofit", tmp_path / "out", model=str(base), tokenizer=str(tmp_path / "other"))
    with pytest.raises(InputError, match=r"is not the vocabulary that .* was trained with; leave it out"):
        tokenizer_of(config)
    assert tokenizer_of(run("retrofit", tmp_path / "out", model=str(base), tokenizer=str(base))) is not None


@pytest.mark.parametrize("stage", ["retrofit", "frozen"])
def test_a_real_pretrained_model_gains(stage: str, shared: Path, corpus: Path, tmp_path: Path) -> None:
    """stories260K on text that it was not trained on: the loss falls, and text comes out."""
    model = shared / "data" / "models" / "stories260K"
    config = run(stage, tmp_path / "out", model=str(model), data=(str(corpus),), streams=STREAMS, cache_dir=tmp_path)
    result = train(config)
    assert result.validation_loss < result.start_loss - 0.1
    loaded, tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    prompt = tokenizer("Once upon a time", return_tensors="pt")
    assert loaded.generate(**prompt, max_new_tokens=4).shape[1] == prompt["input_ids"].shape[1] + 4
