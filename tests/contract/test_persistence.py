"""Saving, loading, copying, pickling, and another attention implementation: the streams stay."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from parscale import InputError, StreamsConfig, parallelize
from parscale.streams import families
from tests.contract.conftest import Case, parallelized, unmapped
from tests.contract.families import COMMON
from tests.contract.reference import truth


@torch.no_grad()
@pytest.mark.parametrize(
    "settings", [{}, {"diversify": ("prefix", "embedding")}, {"streams": 1}], ids=["paper", "embedding", "control"]
)
def test_round_trip(case: Case, ids: Tensor, tmp_path: Path, settings: dict[str, Any]) -> None:
    model = case.build(**settings)
    model.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation=case.backend, output_loading_info=True
    )
    assert not any(report.values()), report
    assert type(loaded) is type(model)
    saved = model.state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in loaded.state_dict().items())
    # not to the bit: on some processors a product depends on where in memory its factors begin
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
    default = AutoModelForCausalLM.from_pretrained(tmp_path)
    if default.config._attn_implementation.removeprefix("parscale|") in case.family.backends:
        truth(case.plain, model, ids).close(default(ids).logits)


@torch.no_grad()
def test_a_checkpoint_of_the_hub_keeps_its_weights(case: Case, ids: Tensor, tmp_path: Path) -> None:
    """The format on the hub is not that of a model in memory: mixtures have a tensor for each expert there."""
    case.plain.save_pretrained(tmp_path / "plain")
    model = parallelized(
        AutoModelForCausalLM.from_pretrained(tmp_path / "plain", attn_implementation=case.backend), streams=2
    )
    model.save_pretrained(tmp_path / "streams")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streams", attn_implementation=case.backend)
    assert torch.equal(unmapped(loaded)(ids).logits, unmapped(model)(ids).logits)
    given = type(model).from_pretrained(tmp_path / "plain", parscale_n=2)
    held = given.state_dict()
    assert all(torch.equal(held[name], tensor) for name, tensor in case.plain.state_dict().items())


def test_config_on_disk(case: Case, tmp_path: Path) -> None:
    case.model.save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["model_type"] == f"{case.plain.config.model_type}_parscale"
    assert (entries["parscale_n"], entries["parscale_n_tokens"]) == (3, 5)
    assert entries["parscale_attn_smooth"] == 0.1
    assert "parscale|" not in json.dumps(entries)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(case.model.config)
    assert StreamsConfig.from_json(vars(config)) == StreamsConfig(streams=3, prefix_tokens=5)


@torch.no_grad()
def test_deepcopy_and_pickle(case: Case, ids: Tensor) -> None:
    model = case.build(diversify=("prefix", "embedding"))
    expected = model(ids).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(ids).logits, expected)
        twin.set_streams(2)
        truth(case.plain, model, ids, streams=2).close(twin(ids).logits)
        assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_pickle_of_a_family_that_another_process_has_not_registered(ids: Tensor, tmp_path: Path) -> None:
    model: Any = parallelized(AutoModelForCausalLM.from_config(AutoConfig.for_model("olmo2", **COMMON)).eval())
    (tmp_path / "model").write_bytes(pickle.dumps((model, ids, model(ids).logits)))
    code = (
        "import pickle, sys, torch\n"
        "model, ids, expected = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(type(model).__name__, torch.equal(model(ids).logits, expected))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "model"], capture_output=True, text=True)
    assert done.stdout.split() == ["Olmo2ParScaleForCausalLM", "True"], done.stderr[-4000:]


def test_a_class_of_no_family_is_not_there() -> None:
    for name in ("NoSuchParScaleConfig", "LlamaParScaleThing", "no_such_name"):
        with pytest.raises(AttributeError, match=f"'{families.__name__}' has no attribute '{name}'"):
            getattr(families, name)


@torch.no_grad()
def test_another_attention_keeps_the_prefix(case: Case, ids: Tensor) -> None:
    model, expected = case.build(), truth(case.plain, case.model, ids)
    for name in case.family.backends:
        model.set_attn_implementation(name)
        assert model.config._attn_implementation == f"parscale|{name}"
        expected.close(model(ids).logits)


@torch.no_grad()
def test_attention_that_carries_no_prefix_is_refused(case: Case, ids: Tensor) -> None:
    AttentionInterface.register("bare", lambda module, query, *_, **__: (query.transpose(1, 2), None))
    model = case.build()
    before = model(ids).logits
    with pytest.raises(InputError, match=r"ForCausalLM.*'bare'.*sdpa"):
        model.set_attn_implementation("bare")
    assert torch.equal(model(ids).logits, before)
    plain = case.family.build(case.backend)
    plain.set_attn_implementation("bare")
    with pytest.raises(InputError, match="'bare'"):
        parallelize(plain)
