"""Every family with every way to tell streams apart: P separate passes with that stream's own weights."""

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import parscale
from parscale import StreamsConfig
from parscale.config import DIVERSIFIERS
from parscale.streams.diversify import projections
from tests.contract.conftest import Case, P, unmapped
from tests.contract.reference import UPDATES, truth
from tests.contract.test_generation import NEW, argmax_loop


@torch.no_grad()
@pytest.mark.parametrize(
    "diversify", [("lora",), ("rank1",), ("prefix", "lora"), ("rank1", "lora"), DIVERSIFIERS], ids="+".join
)
def test_equals_separate_passes(case: Case, ids: Tensor, diversify: tuple[str, ...]) -> None:
    model = case.build(diversify=diversify, lora_rank=3)
    expected = {p: truth(case.plain, model, ids, streams=p) for p in (3, 1, 2)}
    tolerance = max(one.tolerance for one in expected.values())  # each is a sample of the same float32 errors
    for p, one in expected.items():
        model.set_streams(p)
        replace(one, tolerance=tolerance).close(model(ids).logits)


@torch.no_grad()
def test_a_lora_on_chosen_projections(case: Case, ids: Tensor) -> None:
    """On the last and no other one: that is the mean of the passes with the update there."""
    *others, last = dict.fromkeys(name.rpartition(".")[2] for name in projections.find(case.plain))
    model = case.build(diversify=("lora",), lora_rank=3, lora_targets=(last,))
    owners = {name.split(".")[-2] for name, _ in model.named_parameters() if name.endswith("stream_lora_b")}
    assert owners == {last}
    expected = truth(case.plain, model, ids)
    expected.close(model(ids).logits)
    if others:
        whole = case.build(diversify=("lora",), lora_rank=3)
        assert (whole(ids).logits - expected.logits).abs().mean() > 1e-3


@torch.no_grad()
def test_streams_differ(case: Case, ids: Tensor) -> None:
    """Else the separate passes would prove nothing."""
    for diversify in ("lora", "rank1"):
        expected = truth(case.plain, case.build(diversify=(diversify,)), ids)
        assert (expected.streams[0] - expected.streams[1]).abs().mean() > 0.1


@torch.no_grad()
def test_control_of_equal_parameters(case: Case, ids: Tensor) -> None:
    model = case.build(diversify=DIVERSIFIERS, streams=1)
    assert model.base_model.aggregate_layer is None
    truth(case.plain, model, ids).close(model(ids).logits)


@torch.no_grad()
def test_cached_equals_uncached(case: Case, ids: Tensor) -> None:
    model = case.build(diversify=DIVERSIFIERS)
    for p in (2, 3):
        model.set_streams(p)
        cache = DynamicCache(config=model.config)
        steps = [model(part, past_key_values=cache).logits for part in ids.split((4, 3, 1, 1), dim=1)]
        truth(case.plain, model, ids, streams=p).close(torch.cat(steps, dim=1))


@torch.no_grad()
def test_greedy_is_the_uncached_argmax(case: Case, ids: Tensor) -> None:
    model = case.build(diversify=DIVERSIFIERS)
    mask = torch.ones_like(ids)
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **options), argmax_loop(model, ids))


def test_gradients_reach_every_stream(trained_case: Case, ids: Tensor) -> None:
    model = trained_case.build(diversify=DIVERSIFIERS)
    model(ids, labels=ids).loss.backward()
    updates = {name: p for name, p in model.named_parameters() if name.endswith(UPDATES)}
    assert updates
    for name, parameter in updates.items():
        assert parameter.grad is not None, name
        assert (parameter.grad.flatten(1).norm(dim=1) > 0).all(), name


def test_first_gradients_differ(trained_case: Case, ids: Tensor) -> None:
    """B = 0 starts every stream at the plain model; A tells them apart, from the first step on."""
    model: Any = trained_case.family.build(trained_case.backend)
    parscale.parallelize(model, StreamsConfig(P, diversify=("lora",)))
    for module in model.modules():
        if hasattr(module, "stream_lora_a"):
            assert (module.stream_lora_b == 0).all()
            assert module.stream_lora_a.std() > 0
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name.endswith("stream_lora_b"):
            first, second, _ = parameter.grad.flatten(1)
            assert (first - second).norm() > 0.1 * first.norm() > 0, name


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_gives_identical_gradients(trained_case: Case, ids: Tensor, use_reentrant: bool) -> None:
    model = trained_case.build(diversify=DIVERSIFIERS).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in ("prefix_", "stream_", "aggregate_layer")))

    def gradients(one: Any) -> dict[str, Tensor]:
        torch.manual_seed(5)  # dropout
        one(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad for name, p in one.named_parameters() if p.grad is not None}

    expected = gradients(copy.deepcopy(model))
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    found = gradients(model)
    assert list(found) == list(expected)
    assert any(name.endswith(UPDATES) for name in found)
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


@torch.no_grad()
def test_copies(case: Case, ids: Tensor, tmp_path: Path) -> None:
    model = case.build(diversify=DIVERSIFIERS)
    expected = model(ids).logits
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=case.backend, output_loading_info=True
    )
    assert not any(report.values()), report
    for twin in (unmapped(loaded), copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model.with_streams(3)):
        assert torch.equal(twin(ids).logits, expected)
        twin.set_streams(2)
        truth(case.plain, model, ids, streams=2).close(twin(ids).logits)
        assert torch.equal(model(ids).logits, expected)
