"""Gives a Hugging Face causal LM its streams, in place, as `fully_shard` does for sharding.

Knows which models can have streams, by running one batch and looking which attention modules reach transformers'
attention interface; refuses the others before anything is changed.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from parscale.config import PREFIX_SHAPES, StreamsConfig
from parscale.errors import InputError
from parscale.streams import kv
from parscale.streams.attention import SUPPORTED, inner_attention
from parscale.streams.backbone import StreamsForCausalLM, check_attention
from parscale.streams.diversify import prefix, protocol
from parscale.streams.diversify.calibration import (
    Calibration,
    LayerStatistics,
    describe,
    evaluating,
    own_text,
    random_tokens,
)
from parscale.streams.families import give_streams, own_config, register_family
from parscale.streams.hooked import check_unhooked

RECORD = "parscale-record|"


def parallelize(
    model: PreTrainedModel, config: StreamsConfig | None = None, *, calibration: Tensor | None = None
) -> PreTrainedModel:
    """Give a causal LM P parallel streams, in place (paper, section 2.2).

    Touches: the classes of the model, its backbone and its config (each becomes a subclass of itself); the attention
    implementation (its tagged twin); `config.model_type` and the `parscale…` entries. Adds: `prefix_k`, `prefix_v` to
    every attention module, `aggregate_layer` to the backbone and, if asked for, `stream_embedding` there, and
    `stream_lora_a|b`, `stream_scale_in|out` with their forward hooks to every projection of the hidden state; and with
    shared keys and values, hooks on the causal LM, the attention modules and their key and value projections. No
    existing parameter is changed or renamed. Random draws come from torch's global generator.

    Args:
        model: any decoder from transformers whose attention goes through its `AttentionInterface`.
        config: the streams; the paper's method by default.
        calibration: token ids (B, T) that the prefix's start is fitted to; real text is best. By default 256 random
            tokens, or for a near-identity start 1024 that the model writes itself.

    Returns:
        The same object.

    Raises:
        InputError: the model cannot have streams: encoder-decoders, models without the attention interface (bloom,
            gptj, falcon, opt), models already parallelized, wrapped models, and attention implementations that cannot
            carry a prefix; or `calibration` is not of that shape, or a single token. The model is then as it was.
    """
    config = config or StreamsConfig()
    implementation = check_model(model)
    if calibration is not None and (calibration.ndim != 2 or calibration.numel() < 2):
        raise InputError(
            f"calibration of shape {tuple(calibration.shape)} is not accepted; give token ids (B, T), at least two"
        )
    ids = random_tokens(model) if calibration is None else calibration.to(model.device)
    recorded = record_attention(model, implementation, ids)
    if config.kv == "shared":
        kv.check(model, recorded)
    diversifiers = protocol.chosen(config)
    for diversifier in diversifiers:
        diversifier.check(model, recorded, config)
    if calibration is None and config.prefix_init == "near_identity":
        recorded = record_attention(model, implementation, own_text(model))
    config_class, model_class = register_family(model.config.model_type)
    _rewrite_config(model, config, config_class, recorded.layers)
    model.__class__ = model_class
    give_streams(model)
    if config.enters_attention:
        model.config._attn_implementation = check_attention(model, implementation)
    for diversifier in reversed(diversifiers):  # the prefix is last: its near-identity start measures the whole model
        diversifier.init(model, recorded)
    return model


def over_its_weights(plain: PreTrainedModel, config: StreamsConfig) -> PreTrainedModel:
    """Another model, with new streams over the weights of a plain one: those are not copied, and it stays as it is.

    Raises:
        InputError: as `parallelize` does.
    """
    kept = {id(tensor): tensor for tensor in [*plain.parameters(), *plain.buffers()]}
    return parallelize(copy.deepcopy(plain, kept), config)


def record_attention(model: PreTrainedModel, implementation: str, ids: Int[Tensor, "b t"]) -> Calibration:
    """Run one batch through the plain model and describe what each attention module attends with.

    Raises:
        InputError: the model looks ahead, or does not run its backbone as a whole.
    """
    seen: dict[nn.Module, LayerStatistics] = {}
    runs: list[bool] = []
    hook = model.base_model.register_forward_hook(lambda *_: runs.append(True))
    try:
        with _recording(model, implementation, seen), evaluating(model), torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    if not runs or model.base_model is model:
        raise InputError(
            f"{type(model).__name__} runs the parts of its backbone one by one, so streams cannot enter it as a whole; "
            "use a family that does not (llama, qwen2, qwen3, mistral, phi3, gemma, gpt2, ...)"
        )
    layers = {name: seen[module] for name, module in model.base_model.named_modules() if module in seen}
    return Calibration(ids, logits, layers)


def check_model(model: Any) -> str:
    """The attention implementation that streams will build on; or the reason why this model cannot have any."""
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"{name} is not a transformers model; give what AutoModelForCausalLM.from_pretrained returns, before "
            "wrapping it (peft, DDP, compile)"
        )
    if isinstance(model, StreamsForCausalLM):
        raise InputError(f"{name} has streams already; use set_streams(p) to run fewer, or load the plain model anew")
    check_unhooked(model)
    if model.config.is_encoder_decoder:
        raise InputError(f"{name} is an encoder-decoder; streams need a decoder-only causal language model")
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is not type(model):
        raise InputError(f"{name} is not a causal language model of transformers; load it with AutoModelForCausalLM")
    if model.config.get_text_config() is not model.config:
        raise InputError(f"{name} reads more than text; streams need a causal language model of text alone")
    implementation: Any = model.config._attn_implementation
    check_attention(model, implementation)
    return implementation


def _rewrite_config(
    model: PreTrainedModel, config: StreamsConfig, config_class: type, statistics: Mapping[str, LayerStatistics]
) -> None:
    own_config(model).__class__ = config_class
    for key, value in ({"parscale": None} | config.to_json()).items():
        setattr(model.config, key, value)
    shapes = {name: layer.shape for name, layer in statistics.items()}
    if config.enters_attention and shapes != prefix.shapes_from_config(model):
        listed = {name: list(shape) for name, shape in shapes.items()}
        model.config.parscale = (model.config.parscale or {}) | {PREFIX_SHAPES: listed}


@contextmanager
def _recording(model: PreTrainedModel, implementation: str, seen: dict[nn.Module, LayerStatistics]) -> Iterator[None]:
    """While it lasts, attention runs as always and leaves its statistics in `seen`."""
    token = _seen.set(seen)
    model.config._attn_implementation = RECORD + implementation
    try:
        yield
    finally:
        model.config._attn_implementation = implementation
        _seen.reset(token)


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *args: Any,
    implementation: str,
    **kwargs: Any,
) -> Any:
    if not getattr(module, "is_causal", True):
        raise InputError(
            f"{type(module).__name__} looks ahead of the token it predicts; streams need a decoder "
            "(a model such as BERT is one with `is_decoder=True` in its config)"
        )
    mask = args[0] if args else kwargs.get("attention_mask")
    _seen.get()[module] = describe(query, key, value, mask, kwargs.get("scaling"))
    return inner_attention(module, implementation)(module, query, key, value, *args, **kwargs)


_seen: ContextVar[dict[nn.Module, LayerStatistics]] = ContextVar("seen")
"""What is recorded now, in this thread."""
for _name in SUPPORTED:
    AttentionInterface.register(RECORD + _name, partial(_record, implementation=_name))
    AttentionMaskInterface.register(RECORD + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
