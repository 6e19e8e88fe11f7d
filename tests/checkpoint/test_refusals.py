"""A full checkpoint with wrong stream tensors, or a damaged file, is an error of one line, not a warning."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from parscale import InputError
from parscale.load import load_model
from tests.small import build, with_streams

Tensors = dict[str, torch.Tensor]
PREFIX = "model.layers.1.self_attn.prefix_v"
HEAD = "model.aggregate_layer.0.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with_streams(build()).save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(InputError) as refused:
        AutoModelForCausalLM.from_pretrained(folder, **options)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
    return str(refused.value)


def test_missing(folder: Path) -> None:
    change(folder, lambda t: (t.pop(PREFIX), t.pop(HEAD)))
    assert f"lacks {HEAD}, {PREFIX}" in refusal(folder)


def test_extra(folder: Path) -> None:
    change(folder, lambda t: t.update({"model.layers.7.self_attn.prefix_k": torch.zeros(4)}))
    assert "unexpected model.layers.7.self_attn.prefix_k" in refusal(folder)


@pytest.mark.parametrize("ignored", [False, True])
def test_misshaped(folder: Path, ignored: bool) -> None:
    change(folder, lambda t: t.update({PREFIX: t[PREFIX][:, :, :2].clone()}))
    words = refusal(folder, ignore_mismatched_sizes=ignored)
    assert f"{PREFIX} (4, 2, 2, 8) instead of (4, 2, 5, 8)" in words


def test_more_streams_than_were_trained(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"parscale_n": 8}))
    words = refusal(folder)
    assert f"{PREFIX} (4, 2, 5, 8) instead of (8, 2, 5, 8)" in words
    assert "set_streams" in words


def test_a_plain_checkpoint_under_a_config_with_streams(folder: Path) -> None:
    config = (folder / "config.json").read_bytes()
    build().save_pretrained(folder)
    (folder / "config.json").write_bytes(config)
    assert "parallelize()" in refusal(folder)


def test_streams_under_a_config_of_one_stream(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"parscale_n": 1}))
    assert "unexpected model.aggregate_layer.0.bias" in refusal(folder)


def test_weights_of_the_base_are_there_too(folder: Path) -> None:
    """transformers would start a missing matrix at random, with a warning. One of another shape is refused unless it is
    told not to."""
    change(folder, lambda t: t.update({"model.norm.weight": torch.ones(5)}))
    assert "model.norm.weight (5,) instead of (32,)" in refusal(folder)
    AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True)
    change(folder, lambda t: t.pop("model.layers.0.mlp.up_proj.weight"))
    assert "lacks model.layers.0.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "x"}, "cannot be loaded: .*'hidden_size': .*int"),
        ({"hidden_act": "nope"}, r"cannot be loaded: KeyError\('nope'\)"),
        ({"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}}, r"cannot be loaded: KeyError\('nope'\)"),
        ({"num_attention_heads": 0}, "cannot be loaded: .* by zero"),
        ({"model_type": "qwen2", "attn_implementation": "flash_attention_2"}, "cannot be loaded: .*FlashAttention2"),
        ({"parscale": {"prefix_shapes": [1]}}, "parscale.prefix_shapes="),
        ({"parscale": {"prefix_shapes": {"layers.9.self_attn": [2, 8, 8]}}}, "parscale.prefix_shapes="),
        ({"parscale": {"prefix_shapes": {"layers.0.self_attn": [2, "8", 8]}}}, "parscale.prefix_shapes="),
    ],
)
def test_settings_that_make_no_model(folder: Path, changes: dict[str, Any], said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match=said) as refused:
        load_model(folder)
    assert "\n" not in str(refused.value)


def test_a_config_that_is_a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="cannot be loaded"):
        load_model(folder)


def test_the_report_is_there_for_those_who_ask(folder: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert model.streams == 4
    assert not any(report.values())


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("damage", ["cut", "header", "empty"])
def test_a_damaged_file_is_named(tmp_path: Path, shard_size: str, damage: str) -> None:
    with_streams(build()).save_pretrained(tmp_path, max_shard_size=shard_size)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-64], "header": b"\xff" * 32 + whole, "empty": b""}[damage])
    words = refusal(tmp_path)
    assert file.name in words
    assert "corrupt or cut short" in words
