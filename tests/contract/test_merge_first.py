"""`merge_first` in every family: the same predictions with the first stream's LoRA in the weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from parscale import InputError, merge_first
from tests.contract.conftest import Case
from tests.contract.reference import truth


def build(case: Case, kv: str) -> Any:
    if kv == "shared" and case.family.recurrent:
        pytest.skip("recurrent layers have no keys to share")
    return case.build(diversify=("prefix", "lora"), lora_rank=3, kv=kv)


@torch.no_grad()
@pytest.mark.parametrize("kv", ["own", "shared"])
def test_predictions_stay(case: Case, ids: Tensor, kv: str) -> None:
    model = build(case, kv)
    expected = {p: truth(case.plain, model, ids, streams=p) for p in (1, 2, 3)}
    weights = [p.clone() for p in case.build(diversify=("lora",), kv=kv).parameters()]
    assert merge_first(model) is model
    assert any(not torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=False))
    for p, truths in expected.items():
        model.set_streams(p)
        truths.close(model(ids).logits)


@torch.no_grad()
def test_prompts_pass_the_weights_alone(case: Case, ids: Tensor) -> None:
    """The plain model of the merged weights, where there is no prefix."""
    if case.family.recurrent:
        pytest.skip("recurrent layers have no keys to share")
    model = merge_first(case.build(diversify=("lora",), prefix_tokens=0, kv="shared"))
    plain = copy.deepcopy(case.plain)
    plain.load_state_dict({name: model.state_dict()[name] for name in plain.state_dict()})
    model.set_streams(1)
    torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


@torch.no_grad()
def test_saves_and_loads(case: Case, ids: Tensor, tmp_path: Path) -> None:
    model = merge_first(build(case, "own"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=case.backend)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="nothing to merge"):
        merge_first(loaded)
