"""The classes `{family}_parscale`: config, backbone and causal LM of any family, made from transformers' own on demand.

Importing this file registers the families of the contract suite with transformers' Auto classes, so a saved model loads
with `AutoModelForCausalLM.from_pretrained` and nothing but `import parscale`. A class is made once and lives in this
module, where pickle finds it, or has it made.
"""

import copy
import functools
import threading
from collections.abc import Callable
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from parscale.config import StreamsConfig, as_written
from parscale.errors import InputError
from parscale.streams import kv
from parscale.streams.backbone import StreamsBackbone, StreamsForCausalLM
from parscale.streams.diversify import protocol
from parscale.streams.diversify.prefix import GENERATOR, shapes_from_config
from parscale.streams.hooked import run_new_class
from parscale.streams.state import StreamState

SUFFIX = "_parscale"

REGISTERED = (
    "qwen2", "qwen3", "llama", "mistral", "phi3", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "mixtral", "qwen3_moe",
    "gpt_oss", "deepseek_v3", "qwen3_next",
)  # fmt: skip
"""Families whose saved models load after `import parscale` alone; for another, call `register_family(model_type)`."""


def _one_at_a_time(function: Callable[..., Any]) -> Callable[..., Any]:
    lock = threading.RLock()

    @functools.wraps(function)
    def locked(*args: Any) -> Any:
        with lock:
            return function(*args)

    return locked


@_one_at_a_time  # threads that want the same family get the same classes
def register_family(model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """Make and register `{model_type}_parscale`; a second call returns the same classes.

    Args:
        model_type: a decoder's `model_type` in transformers, such as "llama".

    Returns:
        The config class and the causal LM class, e.g. `LlamaParScaleConfig` and `LlamaParScaleForCausalLM`.

    Raises:
        InputError: transformers has no causal LM of that type.
    """
    try:
        plain_config = CONFIG_MAPPING[model_type]
        plain_lm: Any = MODEL_FOR_CAUSAL_LM_MAPPING[plain_config]
    except KeyError:
        raise InputError(f"model_type={model_type!r}: transformers has no causal language model of that type") from None
    stem = plain_config.__name__.removesuffix("Config") + "ParScale"
    if f"{stem}Config" in globals():
        return globals()[f"{stem}Config"], globals()[f"{stem}ForCausalLM"]
    config_class = _config_class(plain_config, stem, model_type + SUFFIX)
    lm_class = _lm_class(plain_lm, stem, config_class)
    plain: Any = MODEL_MAPPING.get(plain_config, None)
    if plain is not None:  # pickle asks for it before a model of the family is made
        _backbone_class(plain, config_class)
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, lm_class)
    # A hub checkpoint of a mixture has a tensor for each expert, which transformers stacks for the classes it knows.
    conversions = get_checkpoint_conversion_mapping(plain_lm.__name__) or get_checkpoint_conversion_mapping(model_type)
    if conversions is not None:
        register_checkpoint_conversion_mapping(lm_class.__name__, conversions, overwrite=True)
    return config_class, lm_class


def give_streams(model: Any) -> None:
    """Turn the model's backbone into a `StreamsBackbone` and add the parameters that its `config` tells, uninitialised.

    Args:
        model: a causal LM of a generated class, whose backbone is still of the family's own class.
    """
    config, backbone = model.config, model.base_model
    settings = StreamsConfig.from_json(vars(config))
    backbone.__class__ = _backbone_class(type(backbone), type(config))
    for swapped in (model, backbone):
        run_new_class(swapped)
        # output_hidden_states and the like are looked up by the class's name
        _CAN_RECORD_REGISTRY.update({str(type(swapped)): swapped._can_record_outputs})
    backbone.stream_state = StreamState(settings)
    backbone.prefix_generator = None
    if not hasattr(backbone, "stream_adapters"):
        backbone.stream_adapters = {}
    *_, last = backbone.parameters()  # of the final norm, in families of today: beside what the head reads
    for diversifier in protocol.chosen(settings):
        diversifier.attach(model, backbone.stream_state)
    for module in model.modules():
        if (checkpoint := vars(module).get("_gradient_checkpointing_func")) is not None:  # turned on before
            module._gradient_checkpointing_func = functools.partial(backbone.stream_state.checkpointed, checkpoint)
    if settings.kv == "shared":
        kv.attach(model, list(shapes_from_config(model)))
    backbone.put_on_head(device=last.device, dtype=model.dtype)


def own_config(model: Any) -> Any:
    """The model's config, from now on its own: other models may be made from the same object, and must not change."""
    before, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if vars(module).get("config") is before:
            module.config = own
    return own


def remove_streams(model: Any) -> None:
    """Take from the backbone all parameters that `give_streams` added, before others take their place."""
    kv.detach(model)
    for diversifier in protocol.ALL.values():
        diversifier.detach(model)
    model.base_model.aggregate_layer = None


def _config_class(plain: type[PreTrainedConfig], stem: str, model_type: str) -> type[PreTrainedConfig]:
    annotations = {
        "parscale_n": int,
        "parscale_n_tokens": int,
        "parscale_attn_smooth": float,
        "parscale": dict | None,
    }
    # The released checkpoints' own defaults, which their files may leave out.
    defaults = {"parscale_n": 1, "parscale_n_tokens": 48, "parscale_attn_smooth": 0.01, "parscale": None}

    def to_diff_dict(self: Any) -> dict[str, Any]:
        return as_written(plain.to_diff_dict(self))

    body = {
        "model_type": model_type,
        "to_diff_dict": to_diff_dict,
        "__annotations__": annotations,
        "__module__": __name__,
        **defaults,
    }
    return _publish(type(f"{stem}Config", (plain,), body))


def _lm_class(plain: type[PreTrainedModel], stem: str, config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, config, *args, **kwargs)
        give_streams(self)
        for module in self.base_model.modules():
            self.base_model.init_stream_parameters(module)

    @functools.wraps(plain.forward)  # transformers and others read its signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return StreamsForCausalLM.forward(self, *args, **kwargs)

    body = {
        "config_class": config_class,
        "__annotations__": {"config": config_class},
        "__init__": __init__,
        "forward": forward,
        "__module__": __name__,
        "_keys_to_ignore_on_load_unexpected": {*(plain._keys_to_ignore_on_load_unexpected or ()), rf"\.{GENERATOR}\."},
    }
    return _publish(type(f"{stem}ForCausalLM", (StreamsForCausalLM, plain), body))


def _backbone_class(plain: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> type[PreTrainedModel]:
    name = config_class.__name__.removesuffix("Config") + "Model"
    if not issubclass(globals().get(name, type(None)), plain):
        _publish(type(name, (StreamsBackbone, plain), {"config_class": config_class, "__module__": __name__}))
    return globals()[name]


def _publish(made: type) -> Any:
    globals()[made.__name__] = made
    return made


def __getattr__(name: str) -> Any:
    """A class that is asked for by its name before its family is registered, as pickle does in another process."""
    stem, found, _ = name.partition("ParScale")
    plain_config = getattr(transformers, f"{stem}Config", None) if found else None
    if plain_config is not None:
        register_family(plain_config.model_type)
    if name in globals():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


for _family in REGISTERED:
    register_family(_family)
