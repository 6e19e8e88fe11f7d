"""The stages of training, as the paper has them: what each trains, and at which rates (paper, section 4.2 and 3.3).

- `pretrain`: everything from scratch, streams from step 0.
- `retrofit`: stage 2, all weights of a trained model after streams were added to it.
- `frozen`: only what the streams added; the backbone's gradients are never allocated.
"""

from typing import Any

from torch import nn

from parscale.errors import InputError
from parscale.streams.tensors import belongs_to_streams
from parscale.train.config import Rates, Stage


def is_diversifier(name: str) -> bool:
    """Whether a parameter is one that tells the streams apart: all that `parallelize` added, but the head."""
    return belongs_to_streams(name) and "aggregate_layer" not in name.split(".")


def freeze_backbone(model: nn.Module, stage: Stage) -> None:
    """Mark what the stage trains. In `frozen` the backbone's parameters require no gradient.

    Raises:
        InputError: the stage leaves nothing to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(stage != "frozen" or belongs_to_streams(name))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError("stage 'frozen' on a model without streams: nothing would train; give it streams or a prefix")


def parameter_groups(model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """AdamW's groups. Diversifiers have their own rate; they, the head, biases and norms are not decayed: decay would
    pull the prefixes back together.
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
    groups = [
        {"name": "backbone", "params": matrices, "lr": rates.learning_rate, "weight_decay": rates.weight_decay},
        {"name": "backbone, not decayed", "params": vectors, "lr": rates.learning_rate, "weight_decay": 0.0},
        {"name": "head", "params": head, "lr": rates.learning_rate, "weight_decay": 0.0},
        {"name": "streams", "params": diversifiers, "lr": rates.stream_learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def count_stream_parameters(model: nn.Module) -> int:
    """How many parameters the streams added."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if belongs_to_streams(name))
