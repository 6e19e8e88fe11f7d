"""Merging the first stream's LoRA: what stays, what is refused, and the verb."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from parscale import InputError, load_streams, merge_first, save_streams, use_streams
from parscale.cli import main
from parscale.streams.backbone import streams_of
from tests.serve.processes import byte_tokenizer, save
from tests.small import build, greedy, uncached, with_streams

BOTH: dict[str, Any] = {"diversify": ("prefix", "lora"), "kv": "shared"}


@pytest.fixture
def ids() -> Tensor:
    return torch.arange(3, 12)[None]


def test_generates_what_it_did(ids: Tensor) -> None:
    model = with_streams(build(), **BOTH).double()
    expected = uncached(model, ids)
    merge_first(model)
    assert torch.equal(uncached(model, ids), expected)
    assert torch.equal(greedy(model, ids), expected)


def test_the_difference_keeps_the_settings() -> None:
    model = merge_first(with_streams(build(), lora_rank=3, **BOTH))
    settings = streams_of(model)
    assert (settings.lora_rank, settings.plain_first, settings.kv) == (6, True, "shared")


@torch.no_grad()
def test_a_lora_on_chosen_projections(ids: Tensor) -> None:
    model = with_streams(build(), **BOTH, lora_targets=("q_proj", "k_proj")).double()
    expected = model(ids).logits
    merge_first(model)
    owners = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("stream_lora_a")}
    assert owners == {"q_proj"}, "the keys are the first stream's alone"
    assert torch.allclose(model(ids).logits, expected, atol=1e-12)


@torch.no_grad()
def test_half_precision_rounds_no_more_than_the_weights(ids: Tensor) -> None:
    model = with_streams(build(), **BOTH)
    exact = merge_first(copy.deepcopy(model))
    rounded = merge_first(model.bfloat16())
    for name, weight in rounded.named_parameters():
        if name.endswith("_proj.weight"):
            assert torch.allclose(weight.float(), exact.get_parameter(name), rtol=2**-6, atol=2**-8), name


@torch.no_grad()
def test_one_stream_of_equal_parameters_merges_whole(ids: Tensor) -> None:
    model = with_streams(build(), streams=1, diversify=("prefix", "lora")).double()
    expected = model(ids).logits
    merge_first(model)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert torch.allclose(model(ids).logits, expected, atol=1e-12)


@torch.no_grad()
def test_trains_on(ids: Tensor) -> None:
    model = merge_first(with_streams(build(), **BOTH))
    with torch.enable_grad():
        model(ids, labels=ids).loss.backward()
    assert model.model.layers[0].mlp.up_proj.stream_lora_b.grad[1:].abs().min(dim=0).values.sum() > 0
    assert model.model.layers[0].mlp.up_proj.stream_lora_b.grad[0].abs().sum() == 0


def test_adapters_put_on_a_base_can_be_merged(ids: Tensor, tmp_path: Path) -> None:
    trained = with_streams(build(), **BOTH)
    save_streams(trained, tmp_path)
    model = merge_first(load_streams(build(), tmp_path, name="fast"))
    use_streams(model, None)
    use_streams(model, "fast")
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, trained(ids).logits, atol=1e-4)
    with pytest.raises(InputError, match="made on base model"):
        load_streams(model, tmp_path, name="again")


def two_sets(folder: Path) -> Any:
    save_streams(with_streams(build(), **BOTH), folder)
    return load_streams(load_streams(build(), folder, name="a"), folder, name="b")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: build(), "no LoRA for its first stream"),
        (lambda _: with_streams(build()), "no LoRA for its first stream"),
        (lambda _: with_streams(build(), **BOTH, plain_first=True), "nothing to merge"),
        (lambda _: with_streams(build(), diversify=("lora", "rank1")), "has ['rank1'] beside its LoRA"),
        (lambda _: with_streams(build(), diversify=("lora", "embedding")), "has ['embedding'] beside its LoRA"),
        (two_sets, "holds several sets of streams, ['a', 'b']"),
    ],
)
def test_what_cannot_be_merged_is_refused(make: Any, says: str, tmp_path: Path) -> None:
    model = make(tmp_path)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(InputError) as refused:
        merge_first(model)
    assert says in str(refused.value)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_quantised_weights_are_refused() -> None:
    model = with_streams(build(), **BOTH)
    projection = model.model.layers[1].self_attn.q_proj
    projection.weight = torch.nn.Parameter(projection.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"layers\.1\.self_attn\.q_proj: its weights are quantised"):
        merge_first(model)


def test_the_verb_writes_a_whole_model(ids: Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = with_streams(build(), **BOTH)
    save(tmp_path / "trained", model, byte_tokenizer())
    assert main(["merge-first", str(tmp_path / "trained"), "--out", str(tmp_path / "merged")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "merged")
    assert json.loads((tmp_path / "merged/config.json").read_text())["parscale"]["plain_first"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-4)
    assert (tmp_path / "merged/tokenizer.json").exists()
    for asked, says in ((("trained", "merged"), "holds something already"), (("merged", "again"), "nothing to merge")):
        arguments = [str(tmp_path / asked[0]), "--out", str(tmp_path / asked[1])]
        assert main(["merge-first", *arguments]) == 2
        assert says in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "trained"]
