"""The stages of training, as the paper has them: what each trains, and at which rates (paper, section 4.2 and 3.3).

- `pretrain`: everything from scratch, streams from step 0.
- `retrofit`: stage 2, all weights of a trained model after streams were added to it.
- `frozen`: only what the streams added; the backbone's gradients are never allocated.
- `sft`: all weights, on answers to prompts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from parscale.errors import InputError
from parscale.output import say
from parscale.streams.tensors import belongs_to_streams
from parscale.train.config import Rates, Stage, TrainConfig

_BEST = 0.64
"""Rate times width that did best on the smallest models (LOG.md)."""
_HIGH = 3 * _BEST


def is_diversifier(name: str) -> bool:
    """Whether a parameter is one that tells the streams apart: all that `parallelize` added, but the head."""
    return belongs_to_streams(name) and "aggregate_layer" not in name.split(".")


def freeze_backbone(model: nn.Module, stage: Stage, *, lora: bool = False) -> None:
    """Mark what the stage trains. In `frozen`, and under a LoRA of `peft`, the backbone's own weights get no gradient.

    Raises:
        InputError: the stage leaves nothing to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(belongs_to_streams(name) or (".lora_" in name if lora else stage != "frozen"))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("stage 'frozen' on a model without streams: nothing would train; give it streams or a prefix")


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """AdamW's groups. Diversifiers have their own rate; they, the head, biases and norms are not decayed: decay would
    pull the prefixes back together.

    Raises:
        InputError: every group that there is would have a learning rate of 0.
    """
    matrices, vectors, head, diversifiers = [], [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if is_diversifier(name):
            diversifiers.append(parameter)
        elif belongs_to_streams(name):
            head.append(parameter)
        else:
            (matrices if parameter.ndim > 1 else vectors).append(parameter)
    head_rate = rates.head_rate * rates.learning_rate
    groups = [
        {"name": "backbone", "params": matrices, "lr": rates.learning_rate, "weight_decay": rates.weight_decay},
        {"name": "backbone, not decayed", "params": vectors, "lr": rates.learning_rate, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": head_rate, "weight_decay": 0.0},
        {"name": "streams", "params": diversifiers, "lr": rates.stream_learning_rate, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if all(group["lr"] == 0 for group in groups):
        raise InputError(
            f"learning_rate={rates.learning_rate} and stream_learning_rate={rates.stream_learning_rate}: of what this "
            "stage trains, nothing would change; give a rate above 0"
        )
    return groups


def warn_of_rate(learning_rate: float, width: int) -> None:
    """Say so where a rate would ruin a model so many channels wide: Adam's best rate falls about as one over the width
    (arXiv 2203.03466, table 3)."""
    if learning_rate * width > _HIGH:
        say(
            f"learning_rate={learning_rate:g} is high for a model {width} wide: from scratch about {_BEST / width:.1g} "
            "does best, and a trained model takes less, or is ruined (docs/train.md, Rates)"
        )


def schedule(config: TrainConfig, steps: int) -> dict[str, Any]:
    """The learning rates' course over `steps`, as arguments of `TrainingArguments`."""
    course: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": round(config.warmup * steps)}
    if config.schedule == "cosine":
        return course
    falling = {"num_decay_steps": round(config.decay * steps), "decay_type": "linear"}
    return course | {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": falling}


def hold_backbone(scheduler: LambdaLR, held: int, warmup: int) -> LambdaLR:
    """The same course, but for the backbone: its rate is 0 for `held` steps, then comes in over `warmup` steps."""

    def late(factor: Callable[[int], float], step: int) -> float:
        return factor(step) * min(1.0, max(0, step - held + 1) / (warmup + 1))

    groups = scheduler.optimizer.param_groups
    factors = [
        partial(late, factor) if group["name"].startswith("backbone") else factor
        for factor, group in zip(scheduler.lr_lambdas, groups, strict=True)
    ]
    return LambdaLR(scheduler.optimizer, factors)


def count_stream_parameters(model: nn.Module) -> int:
    """How many parameters the streams added."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if belongs_to_streams(name))
