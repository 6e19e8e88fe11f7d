"""The model of a run: built or loaded, quantised, given streams and a LoRA; what of it trains, and how it is saved.

A LoRA of `peft` wraps the model that has the streams. It and a quantised backbone are saved as adapters: the streams
(`streams.safetensors`) and the LoRA (`adapter_model.safetensors`) beside each other, without the backbone.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from parscale.errors import InputError
from parscale.load import load_model
from parscale.streams.backbone import has_streams, streams_of
from parscale.streams.checkpoint import save_streams
from parscale.streams.parallelize import parallelize
from parscale.streams.tensors import belongs_to_streams
from parscale.train.config import NOT_GIVEN, TrainConfig
from parscale.train.shapes import build, check_context, check_vocabulary
from parscale.train.stages import freeze_backbone


def model_of(config: TrainConfig, tokenizer: Any, calibration: torch.Tensor) -> Any:
    """The model that a run trains, with everything frozen that its stage does not train.

    Args:
        config: the run.
        tokenizer: whose ids it will see.
        calibration: token ids (B, T) of its text, that the prefix's start is fitted to.

    Raises:
        InputError: the model cannot be had or trained on, does not fit the tokenizer, or has other streams than asked
            for.
    """
    if config.stage == "pretrain":
        model: Any = build(config.model, tokenizer, config.block_size)
    else:
        model = load_model(config.model, quantize=config.quantize, dtype=getattr(torch, config.dtype))
        _check_quantized(model, config)
        check_vocabulary(model.config.vocab_size, tokenizer, config.model)
    check_context(model, config.block_size, config.model)
    _give_streams(model, config, calibration)
    if config.quantize != "none":
        # the Trainer wants adapters on a quantised model: the streams are some; and it knows no 4 bits of torchao
        model._hf_peft_config_loaded = True
    if config.peft == "lora":
        model = _with_lora(model, config.peft_rank)
    freeze_backbone(model, config.stage, lora=config.peft == "lora")
    if config.stage == "frozen" or config.peft == "lora":
        _widen(model)
    if config.gradient_checkpointing:
        # transformers 5.17 knows only the second name; later ones warn of it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model


def _widen(model: Any) -> None:
    """What trains in front of a backbone at rest is kept in float32: it is little, and in bfloat16 its small steps
    would round away. In the forward pass it takes the activations' dtype."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def base_of(model: Any) -> Any:
    """The model that has the streams: itself, or what a LoRA of `peft` wraps."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def save_model(model: Any, folder: Path, whole: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model so that `load_model` finds it again; a LoRA is taken off the model for it.

    `whole` is the state of a model that is sharded.
    """
    if base_of(model) is not model:
        model.save_pretrained(folder, save_embedding_layers=False)
        base = model.unload()
        if has_streams(base):
            save_streams(base, folder)
    elif getattr(model, "is_quantized", False):
        save_streams(model, folder)
    else:
        if has_streams(model):
            model.base_model.fold_prefix_generator()
        model.save_pretrained(folder, state_dict=whole)


def _check_quantized(model: Any, config: TrainConfig) -> None:
    """Refuse what cannot be trained of adapters on a base in few bits."""
    if hasattr(model, "peft_config"):
        raise InputError(
            f"model={config.model!r} is a LoRA on a base in few bits, into which it cannot be merged to train on: "
            "take the base, and more steps"
        )
    if getattr(model, "is_quantized", False) and config.quantize == "none":
        raise InputError(f"model={config.model!r} has its base in few bits: give quantize, as it was trained with")


def _give_streams(model: PreTrainedModel, config: TrainConfig, calibration: torch.Tensor) -> None:
    if not has_streams(model):
        if not config.streams.is_plain:
            parallelize(model, config.streams, calibration=calibration)
    elif config.streams is not NOT_GIVEN and config.streams != streams_of(model):
        raise InputError(
            f"model={config.model!r} has streams of its own ({streams_of(model).to_dict()}); leave out the flags "
            "of the streams, or give the same, to go on with them"
        )


def _with_lora(model: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("peft='lora' needs the package peft: pip install 'parscale[peft]'") from None
    backbone = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D)
        and module is not model.get_output_embeddings()
        and not belongs_to_streams(name)
    ]
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=backbone, task_type="CAUSAL_LM")
    return get_peft_model(model, settings)
