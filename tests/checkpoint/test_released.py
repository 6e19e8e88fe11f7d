"""The released format: read as the released code reads it, written back as it was."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import parscale  # noqa: F401  registers the families
from tests.data import make_released
from tests.data.make_released import CASES, Case

RELEASED = Path(make_released.__file__).parent / "released"
SHARED_CASES = (
    "p1_tied",
    "p1_untied",
    "p2_n48_tied_s0.01",
    "p2_n5_untied_s0.1",
    "p4_n48_bf16_sharded",
    "p4_n48_untied_s0.01",
    "p4_n5_tied_s0.1",
)
BACKENDS = ("eager", "sdpa")
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
backends = pytest.mark.parametrize("backend", BACKENDS)


def load(directory: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, **{"dtype": torch.float32} | options)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {k: v for file in directory.glob("model*.safetensors") for k, v in load_file(file).items()}


def assert_same_bytes(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor.view(torch.uint8), other[name].view(torch.uint8)), name


def float32_error(case: Case) -> float:
    """What float32 arithmetic alone does to the reference's logits; eight times, for another order of summation."""
    single = {k: v.astype(np.float32) for k, v in make_released.stored_weights(RELEASED / case.name).items()}
    expected = load_file(RELEASED / case.name / "reference.safetensors")
    made = np.stack([make_released.logits(case, single, row) for row in expected["input_ids"].numpy()])
    assert made.dtype == np.float32
    return 8 * float(np.abs(made - expected["logits"].numpy()).max())


def left_padded(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    mask = torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]
    return ids * mask, mask.long()


@cases
@backends
def test_outputs_are_the_references(case: Case, backend: str) -> None:
    expected = load_file(RELEASED / case.name / "reference.safetensors")
    model = load(RELEASED / case.name, attn_implementation=backend)
    ids, new = expected["input_ids"], make_released.NEW_TOKENS
    with torch.no_grad():
        logits = model(ids).logits
    torch.testing.assert_close(logits.double(), expected["logits"], atol=float32_error(case), rtol=0)
    assert torch.equal(model.generate(ids, max_new_tokens=new, do_sample=False), expected["greedy"])
    padded, mask = left_padded(ids, expected["lengths"])
    after = model.generate(padded, attention_mask=mask, max_new_tokens=new, do_sample=False)[:, ids.shape[1] :]
    assert torch.equal(after, expected["greedy_cut"])
    beam = model.generate(ids, max_new_tokens=new, num_beams=make_released.BEAMS, do_sample=False)
    assert torch.equal(beam, expected["beam"])


@cases
def test_the_reference_follows_from_the_files(case: Case) -> None:
    weights = make_released.stored_weights(RELEASED / case.name)
    made = make_released.outputs(case, weights)
    stored = load_file(RELEASED / case.name / "reference.safetensors")
    assert made.keys() == stored.keys()
    for name, values in made.items():
        np.testing.assert_allclose(values.numpy(), stored[name].numpy(), atol=1e-12, err_msg=name)


@cases
@pytest.mark.parametrize("shard_size", ["1GB", "2KB"])
def test_saving_writes_the_same_format_back(case: Case, shard_size: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(RELEASED / case.name)
    assert model.dtype == getattr(torch, case.dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard_size == "2KB")
    assert_same_bytes(tensors_of(tmp_path), tensors_of(RELEASED / case.name))
    before = json.loads((RELEASED / case.name / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    rewritten = {"auto_map", "transformers_version"}
    assert {k: v for k, v in before.items() if k not in rewritten} == {k: after[k] for k in before.keys() - rewritten}
    assert not {"parscale", "auto_map"} & after.keys()
    ids = torch.arange(3, 12)[None]
    assert torch.equal(load(tmp_path)(ids).logits, load(RELEASED / case.name)(ids).logits)


def test_the_code_that_auto_map_names_is_not_looked_for() -> None:
    model = load(RELEASED / "p2_n3_untied", trust_remote_code=True)
    assert type(model).__module__ == "parscale.streams.families"
    assert type(model).__name__ == "Qwen2ParScaleForCausalLM"


def test_only_p1_of_the_released_format_has_no_prefix() -> None:
    p1, p2 = (load(RELEASED / name) for name in ("p1_tied", "p2_n3_untied"))
    assert not any("prefix" in name or "aggregate" in name for name in p1.state_dict())
    assert p1.config._attn_implementation == "sdpa"
    assert sum("prefix" in name for name in p2.state_dict()) == 4


def test_what_a_config_leaves_out_is_as_the_released_code_has_it(tmp_path: Path) -> None:
    entries = json.loads((RELEASED / "p1_tied" / "config.json").read_text())
    kept = {k: v for k, v in entries.items() if not k.startswith("parscale")}
    (tmp_path / "config.json").write_text(json.dumps(kept))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.parscale_n, config.parscale_n_tokens, config.parscale_attn_smooth) == (1, 48, 0.01)


def test_a_stretched_rope_keeps_its_scaling_in_both_spellings(tmp_path: Path) -> None:
    entries = json.loads((RELEASED / "p2_n3_untied" / "config.json").read_text())
    entries["rope_scaling"] = {"rope_type": "linear", "factor": 2.0}
    ours = tmp_path / "older"
    ours.mkdir()
    (ours / "config.json").write_text(json.dumps(entries))
    read = AutoConfig.from_pretrained(ours)
    read.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["rope_theta"] == make_released.THETA
    assert saved["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert AutoConfig.from_pretrained(tmp_path / "saved").rope_parameters == read.rope_parameters


@backends
@pytest.mark.parametrize("name", SHARED_CASES)
def test_outputs_are_those_of_the_released_code(name: str, backend: str, shared: Path) -> None:
    folder = shared / "official-fixtures" / name
    model = load(folder / "checkpoint", attn_implementation=backend)
    stored = load_file(folder / "reference.safetensors")
    inputs = {k.removeprefix("input."): v for k, v in stored.items() if k.startswith("input.")}
    expected = {k.removeprefix(f"{backend}."): v for k, v in stored.items() if k.startswith(f"{backend}.")}
    ids = inputs["input_ids"]
    padded = {"input_ids": inputs["pad_input_ids"], "attention_mask": inputs["pad_attention_mask"]}
    real = inputs["pad_attention_mask"].bool()

    def close(actual: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)

    with torch.no_grad():
        close(model(ids).logits, expected["logits"])
        close(model(ids[:, :1]).logits, expected["logits_single_token"])
        with_positions = model(**padded, position_ids=inputs["pad_position_ids"]).logits
        close(with_positions[real], expected["logits_leftpad_pos"][real])
        # The released code goes wrong without position ids (`logits_leftpad_nopos`); this library does not need them.
        close(model(**padded).logits[real], expected["logits_leftpad_pos"][real])
    options = {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    greedy = model.generate(ids[:2], max_new_tokens=24, **options)
    assert torch.equal(greedy.sequences, expected["greedy"])
    close(torch.stack(greedy.scores, dim=1), expected["greedy_step_logits"])
    assert torch.equal(model.generate(**padded, max_new_tokens=24, do_sample=False), expected["greedy_leftpad"])
    beam = model.generate(ids[:2], num_beams=3, num_return_sequences=3, max_new_tokens=16, **options)
    assert torch.equal(beam.sequences, expected["beam3"])
    close(beam.sequences_scores, expected["beam3_scores"])
    beam = model.generate(**padded, num_beams=3, max_new_tokens=16, **options)
    assert torch.equal(beam.sequences, expected["beam3_leftpad"])
    close(beam.sequences_scores, expected["beam3_leftpad_scores"])


@pytest.mark.parametrize("name", SHARED_CASES)
def test_the_released_codes_files_are_written_back(name: str, shared: Path, tmp_path: Path) -> None:
    folder = shared / "official-fixtures" / name / "checkpoint"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    assert_same_bytes(tensors_of(tmp_path), tensors_of(folder))
