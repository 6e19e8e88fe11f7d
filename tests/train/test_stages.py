"""What each stage trains, and at which rate."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, get_scheduler

import parscale
from parscale.errors import InputError
from parscale.train.config import Rates, TrainConfig
from parscale.train.stages import (
    count_stream_parameters,
    freeze_backbone,
    hold_backbone,
    is_diversifier,
    parameter_groups,
    schedule,
)


def plain():
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def model():
    return parscale.parallelize(plain(), parscale.StreamsConfig(2, 4, diversify=("prefix", "embedding")))


def test_frozen_allocates_no_gradient_for_the_backbone(model) -> None:
    freeze_backbone(model, "frozen")
    ids = torch.randint(0, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        added = any(part in name for part in ("prefix_", "stream_embedding", "aggregate_layer"))
        assert (parameter.grad is not None) == added, name


def test_retrofit_trains_everything(model) -> None:
    freeze_backbone(model, "frozen")
    freeze_backbone(model, "retrofit")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_frozen_without_streams_is_refused() -> None:
    plain = AutoModelForCausalLM.from_config(Qwen2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(InputError, match="nothing would train"):
        freeze_backbone(plain, "frozen")


def test_every_parameter_is_in_one_group_and_only_matrices_of_the_backbone_decay(model) -> None:
    groups = {group["name"]: group for group in parameter_groups(model, Rates(1e-3, 1e-2, 0.1))}
    grouped = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert groups["streams"]["lr"] == 1e-2
    assert groups["streams"]["weight_decay"] == groups["head"]["weight_decay"] == 0
    assert groups["backbone"]["weight_decay"] == 0.1
    in_streams = {id(p) for p in groups["streams"]["params"]}
    assert in_streams == {id(p) for name, p in model.named_parameters() if is_diversifier(name)}
    assert all(p.ndim > 1 for p in groups["backbone"]["params"])


def test_stream_parameters_are_what_the_paper_counts(model) -> None:
    # prefixes: 2 (k and v) · P · layers · kv heads · n · head size; head: P·d·d + d + d·P + P; vectors: P·d
    prefixes, head, vectors = 2 * 2 * 2 * 2 * 4 * 16, 2 * 32 * 32 + 32 + 32 * 2 + 2, 2 * 32
    assert count_stream_parameters(model) == prefixes + head + vectors


@pytest.mark.parametrize("rates", [(0.0, 0.0, 0.1), (-1e-3, 1e-3, 0.1), (1e-3, float("nan"), 0.1)])
def test_rates_that_train_nothing_or_diverge_are_refused(rates) -> None:
    with pytest.raises(InputError, match="learning_rate"):
        Rates(*rates)


def test_updates_of_the_projections_belong_to_the_streams() -> None:
    updates = parscale.StreamsConfig(2, diversify=("lora", "rank1"), lora_rank=3)
    model = parscale.parallelize(plain(), updates)
    # on q, k, v and gate, up: r·(in + out) a stream for lora, in + out for rank1
    updated, head = 2 * 2 * (3 + 1) * (3 * (32 + 32) + 2 * (32 + 64)), 2 * 32 * 32 + 32 + 32 * 2 + 2
    assert count_stream_parameters(model) == updated + head
    freeze_backbone(model, "frozen")
    ids = torch.randint(0, 64, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    trained = {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {"stream_lora_a", "stream_lora_b", "stream_scale_in", "stream_scale_out", "weight", "bias"}
    groups = {group["name"]: group for group in parameter_groups(model, Rates(1e-3, 1e-2, 0.1))}
    assert sum(p.numel() for p in groups["streams"]["params"]) == updated


def rates_of(model, config: TrainConfig, steps: int) -> dict[str, list[float]]:
    """The learning rate of each group at every step, by the Trainer's own way of making schedules."""
    groups = parameter_groups(model, config.rates)
    optimizer = torch.optim.AdamW(groups)
    settings = schedule(config, steps)
    scheduler = get_scheduler(
        settings["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=settings["warmup_steps"],
        num_training_steps=steps,
        scheduler_specific_kwargs=settings.get("lr_scheduler_kwargs"),
    )
    if held := round(config.backbone_delay * steps):
        scheduler = hold_backbone(scheduler, held, settings["warmup_steps"])
    seen: dict[str, list[float]] = {group["name"]: [] for group in groups}
    for _ in range(steps):
        for group in optimizer.param_groups:
            seen[group["name"]].append(group["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_warm_up_stable_decay(model) -> None:
    config = TrainConfig("retrofit", Path("o"), learning_rate=1.0, stream_learning_rate=2.0, warmup=0.1, decay=0.5)
    rates = rates_of(model, config, 20)
    expected = [0, 0.5] + [1.0] * 8 + [1 - step / 10 for step in range(10)]
    assert rates["backbone"] == pytest.approx(expected)
    assert rates["streams"] == pytest.approx([2 * rate for rate in expected])


def test_cosine(model) -> None:
    config = TrainConfig("retrofit", Path("o"), learning_rate=1.0, schedule="cosine", warmup=0.2)
    expected = [step / 4 for step in range(4)] + [0.5 * (1 + math.cos(math.pi * step / 16)) for step in range(16)]
    assert rates_of(model, config, 20)["backbone"] == pytest.approx(expected)


def test_the_backbone_may_begin_later(model) -> None:
    config = TrainConfig("retrofit", Path("o"), learning_rate=1.0, warmup=0.1, decay=0.0, backbone_delay=0.25)
    rates = rates_of(model, config, 20)
    assert rates["backbone"] == rates["backbone, not decayed"]
    assert rates["backbone"] == pytest.approx([0.0] * 5 + [1 / 3, 2 / 3] + [1.0] * 13)
    assert rates["head"] == pytest.approx([0, 0.5] + [1.0] * 18)


def test_the_head_may_have_a_rate_of_its_own(model) -> None:
    config = TrainConfig("retrofit", Path("o"), learning_rate=2.0, head_rate=0.25, warmup=0.0, decay=0.0)
    rates = rates_of(model, config, 4)
    assert (rates["head"], rates["backbone"]) == ([0.5] * 4, [2.0] * 4)
    with pytest.raises(InputError, match="head_rate=-1 is not accepted"):
        TrainConfig("retrofit", Path("o"), head_rate=-1)


def test_a_rate_of_zero_for_all_that_a_stage_trains_is_refused() -> None:
    model = parscale.parallelize(plain(), parscale.StreamsConfig(1, 4))
    freeze_backbone(model, "frozen")
    with pytest.raises(InputError, match=r"learning_rate=0\.001 and stream_learning_rate=0: of what this stage trains"):
        parameter_groups(model, Rates(1e-3, 0, 0.1))
