"""A folder with a LoRA or a tokenizer that is not whole is an error of one line, and no pickle is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from parscale import InputError, StreamsConfig, parallelize, save_streams
from parscale.load import comes_with_streams, load_model, load_tokenizer
from tests.small import build, with_streams

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft asks for the old name

SETTINGS, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def refusal(load: Callable[[Path], Any], folder: Path) -> str:
    with pytest.raises(InputError) as refused:
        load(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
    return str(refused.value)


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA whose updates are not zero, and its base beside it."""
    build().save_pretrained(tmp_path / "base")
    model = get_peft_model(
        load_model(tmp_path / "base"), LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    )
    model.save_pretrained(tmp_path / "lora")
    return tmp_path / "lora"


def settings(folder: Path, **changes: Any) -> None:
    held = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(held | changes))


def tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(edit(load_file(folder / TENSORS)), folder / TENSORS)


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / TENSORS), folder / "adapter_model.bin")
    (folder / TENSORS).unlink()


def test_a_lora_is_merged(lora: Path) -> None:
    matrix, held = "model.layers.1.self_attn.q_proj", load_file(lora / TENSORS)
    a, b = (held[f"base_model.model.{matrix}.lora_{x}.weight"] for x in "AB")
    scale = json.loads((lora / SETTINGS).read_text())["lora_alpha"] / 2
    base, merged = (dict(model.named_parameters()) for model in (build(), load_model(lora)))
    assert merged.keys() == base.keys()
    torch.testing.assert_close(merged[f"{matrix}.weight"], base[f"{matrix}.weight"] + scale * b @ a)


def test_a_base_that_was_named_from_above_is_found_beside_the_adapter(lora: Path, monkeypatch) -> None:
    expected = load_model(lora).state_dict()
    settings(lora, base_model_name_or_path="base")  # as a run in the folder above writes it
    monkeypatch.chdir("/")
    assert all(torch.equal(x, expected[name]) for name, x in load_model(lora).state_dict().items())
    settings(lora, base_model_name_or_path="nowhere/at/all")
    assert "of its base, model 'nowhere/at/all'" in refusal(load_model, lora)


@pytest.mark.parametrize("beside_a_model", [False, True])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda f: (f / TENSORS).write_bytes((f / TENSORS).read_bytes()[:100]), "corrupt or cut short"),
        (lambda f: (f / TENSORS).unlink(), f"has no {TENSORS}"),
        (pickled, f"has no {TENSORS}"),
    ],
    ids=["cut", "missing", "pickle"],
)
def test_a_lora_comes_from_whole_safetensors(damage: Any, said: str, beside_a_model: bool, lora: Path) -> None:
    if beside_a_model:
        build().save_pretrained(lora)
    damage(lora)
    assert said in refusal(load_model, lora)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "FOO"}, "FOO"),
        ({"target_modules": ["nope"]}, "nope"),
        ({"target_modules": "("}, "unterminated"),
        ({"r": -1}, "-1"),
        ({"r": 8}, "size mismatch for base_model.model.model.layers.0"),
        ({"target_modules": ["q_proj"]}, "0 tensors are missing and 4 go nowhere"),
        ({"target_modules": ["q_proj", "o_proj", "v_proj"]}, "4 tensors are missing and 0 go nowhere"),
    ],
    ids=str,
)
def test_settings_that_are_not_those_of_the_lora(changes: dict[str, Any], said: str, lora: Path) -> None:
    settings(lora, **changes)
    assert said in refusal(load_model, lora)


def test_a_lora_that_lacks_a_layer(lora: Path) -> None:
    tensors(lora, lambda held: {name: tensor for name, tensor in held.items() if ".layers.0." not in name})
    assert "4 tensors are missing and 0 go nowhere, as base_model.model.model.layers.0" in refusal(load_model, lora)


def test_a_lora_without_peft_says_what_to_install(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    assert "pip install 'parscale[peft]'" in refusal(load_model, lora)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        *(("tokenizer.json", content) for content in ("{", "{}", "[]", "null", '{"version": "1.0", "model": {}}')),
        *(("tokenizer_config.json", content) for content in ("{", "[]", "null", '{"tokenizer_class": 5}')),
    ],
)
def test_a_tokenizer_that_is_none(file: str, content: str, tmp_path: Path) -> None:
    build().config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (tmp_path / file).write_text(content)
    assert "cannot be loaded" in refusal(load_tokenizer, tmp_path)


def test_whether_a_model_comes_with_streams(lora: Path, tmp_path: Path) -> None:
    assert not comes_with_streams(tmp_path / "base")
    assert not comes_with_streams(lora)
    parallelize(build(), StreamsConfig(1, 0)).save_pretrained(tmp_path / "none")
    assert not comes_with_streams(tmp_path / "none")
    with_streams(build()).save_pretrained(tmp_path / "whole")
    save_streams(with_streams(load_model(tmp_path / "base")), tmp_path / "adapter")
    assert comes_with_streams(tmp_path / "whole")
    assert comes_with_streams(tmp_path / "adapter")
    settings(lora, base_model_name_or_path=str(tmp_path / "whole"))
    assert comes_with_streams(lora), "its base does"
    assert "no such folder here" in refusal(comes_with_streams, tmp_path / "absent")
