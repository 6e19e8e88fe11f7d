"""Prefixes that a generator makes, in everything that keeps a model's state: what comes back predicts and trains on as
what went in.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

import parscale
from parscale.errors import InputError
from parscale.streams.tensors import belongs_to_streams
from tests.small import VOCABULARY, build, with_streams

# The Trainer reads config.json as no family's, and warns of a name in it that the released code reads.
pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")

KINDS = {
    "own": {},
    "shared": {"kv": "shared", "diversify": ("prefix", "lora", "rank1")},
    "one prefix": {"shared_prefix": True, "kv": "shared", "diversify": ("prefix", "lora")},
}


def model_of(kind: str = "own", family: str = "llama") -> Any:
    return with_streams(build(family), streams=2, prefix_init="reparameterized", **KINDS[kind])


def batch(seed: int = 3, rows: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, 12), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=batch()).logits


def trained(kind: str = "own", steps: int = 2, model: Any = None) -> Any:
    """A model whose generator is no longer what it began as, and whose banks are left behind."""
    model = model or model_of(kind)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for step in range(steps):
        model.train()(input_ids=batch(step), labels=batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class _StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def run(
    model: Any, folder: Path, *, frozen: bool = False, stop: int = 0, resume: Path | None = None, **more: Any
) -> Any:
    """Six steps of a plain Trainer, or fewer. Returns it."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen or belongs_to_streams(name))
    rows: Any = [{"input_ids": ids, "labels": ids} for ids in batch(9, rows=24)]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, max_steps=6, save_steps=3, learning_rate=0.02, seed=7,
        report_to="none", use_cpu=True, disable_tqdm=True, logging_steps=1, **more,
    )  # fmt: skip
    callbacks: list[Any] = [_StopAt(stop)] if stop else []
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def same(one: Any, other: Any) -> None:
    for (name, expected), (_, found) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(expected, found), name
    assert torch.equal(logits(one), logits(other))


@pytest.mark.parametrize(("kind", "frozen"), [("own", True), ("own", False), ("shared", False), ("one prefix", True)])
def test_a_plain_trainer_resumes_to_the_same_bits(kind: str, frozen: bool, tmp_path: Path) -> None:
    whole, part, on = model_of(kind), model_of(kind), model_of(kind)
    run(whole, tmp_path / "whole", frozen=frozen)
    run(part, tmp_path / "part", frozen=frozen, stop=3)
    run(on, tmp_path / "part", frozen=frozen, resume=tmp_path / "part" / "checkpoint-3")
    same(whole, on)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_model_at_the_end_is_the_one_that_was_measured(kind: str, tmp_path: Path) -> None:
    model = model_of(kind)
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    trainer = run(model, tmp_path, eval_steps=3, greater_is_better=True, **best)  # the worse one is of step 3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    same(model, _resumed(tmp_path / "checkpoint-3", kind))


def _resumed(folder: Path, kind: str) -> Any:
    model = model_of(kind)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_trainer_saves_loads_without_the_generator(kind: str, tmp_path: Path) -> None:
    model = trained(kind)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "pieces", max_shard_size="20kB")
    assert len(list((tmp_path / "pieces").glob("*.safetensors"))) > 1
    for folder in ("one", "pieces"):
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / folder, output_loading_info=True)  # type: ignore[misc]
        assert not any(info.values()), info
        assert loaded.base_model.prefix_generator is None
        assert torch.equal(logits(loaded), logits(model))
        parscale.save_streams(loaded, tmp_path / f"{folder}-streams")
    model.base_model.fold_prefix_generator()
    model.save_pretrained(tmp_path / "folded")
    assert not [name for name in load_file(tmp_path / "folded" / "model.safetensors") if "generator" in name]


def through_torch(model: Any, twin: Any, folder: Path) -> None:
    torch.save(model.state_dict(), folder / "state.pt")
    twin.load_state_dict(torch.load(folder / "state.pt", weights_only=True))


def through_safetensors(model: Any, twin: Any, folder: Path) -> None:
    save_model(model, str(folder / "model.safetensors"))
    load_model(twin, str(folder / "model.safetensors"))


def through_a_file_of_its_state(model: Any, twin: Any, folder: Path) -> None:
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "state.safetensors")
    twin.load_state_dict(load_file(folder / "state.safetensors"))


def through_accelerate(model: Any, twin: Any, folder: Path) -> None:
    for one, go in ((model, "save_state"), (twin, "load_state")):
        accelerator = Accelerator(cpu=True)
        accelerator.prepare(one)
        getattr(accelerator, go)(str(folder / "state"))


def through_a_distributed_checkpoint(model: Any, twin: Any, folder: Path) -> None:
    dcp.state_dict_saver.save(model.state_dict(), checkpoint_id=folder / "dcp", no_dist=True)
    state = twin.state_dict()
    dcp.state_dict_loader.load(state, checkpoint_id=folder / "dcp", no_dist=True)
    twin.load_state_dict(state)


def through_a_wrapper(model: Any, twin: Any, folder: Path) -> None:
    """As DDP and torch.compile wrap a model."""
    torch.nn.Sequential(twin).load_state_dict(torch.nn.Sequential(model).state_dict())


WAYS = [
    through_torch, through_safetensors, through_a_file_of_its_state, through_accelerate,
    through_a_distributed_checkpoint, through_a_wrapper,
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("way", WAYS)
def test_a_state_comes_back(way: Callable[[Any, Any, Path], None], tmp_path: Path) -> None:
    model, twin = trained(), trained(steps=1)
    assert not torch.equal(logits(model), logits(twin))
    way(model, twin, tmp_path)
    same(model, twin)
    same(trained(model=model), trained(model=twin))


def test_a_state_goes_into_a_model_that_has_no_generator() -> None:
    model, folded = trained(), trained(steps=1)
    folded.base_model.fold_prefix_generator()
    result = folded.load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys
    assert all("prefix_generator" in name for name in result.unexpected_keys)
    assert torch.equal(logits(folded), logits(model))


def test_prefixes_without_their_generator_are_refused() -> None:
    """They would be loaded, and the model would go on with what its own generator makes."""
    model, folded = trained(), trained(steps=1)
    folded.base_model.fold_prefix_generator()
    before = logits(model)
    with pytest.raises(InputError, match=r"prefixes without the generator.*fold_prefix_generator\(\)"):
        model.load_state_dict(folded.state_dict(), strict=False)
    assert torch.equal(logits(model), before)
    base_alone = {k: v for k, v in folded.state_dict().items() if not belongs_to_streams(k)}
    assert model.load_state_dict(base_alone, strict=False).missing_keys
    model.base_model.fold_prefix_generator()
    model.load_state_dict(folded.state_dict())
    assert torch.equal(logits(model), logits(folded))


def test_means_of_weights_are_saved_as_they_predict(tmp_path: Path) -> None:
    """A mean of generators makes other prefixes than the mean of what they make."""
    model = model_of()
    averaged: Any = AveragedModel(model)
    for _ in range(2):
        averaged.update_parameters(trained(model=model, steps=1))
    averaged.module.save_pretrained(tmp_path / "swa")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "swa")
    assert torch.equal(logits(loaded), logits(averaged.module))

    states = [trained(steps=steps).state_dict() for steps in (1, 3)]
    mean = {name: (tensor + states[1][name]) / 2 for name, tensor in states[0].items()}
    model.load_state_dict(mean)
    model.save_pretrained(tmp_path / "ema", state_dict=mean)
    trained(model=model).save_pretrained(tmp_path / "another", state_dict=mean)
    expected = model_of()
    expected.load_state_dict(mean)
    for folder in ("ema", "another"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), logits(expected))


def test_a_published_model_has_no_generator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []

    class Hub:
        def __init__(self, **_: Any) -> None: ...
        def create_repo(self, *_: Any, **__: Any) -> None: ...

        def upload_folder(self, folder_path: str, **_: Any) -> str:
            names.extend(load_file(Path(folder_path, "model.safetensors")))
            return ""

    monkeypatch.setattr("parscale.streams.hub.HfApi", Hub)
    facts = {"base": "base", "tokens": 1, "loss": None, "control_loss": None}
    parscale.push_to_hub(trained(), "someone/model", facts)
    assert any("prefix_k" in name for name in names)
    assert not any("generator" in name for name in names)
