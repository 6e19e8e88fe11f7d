"""Run by test_offload.py in a process of its own: a model whose layers lie on two devices, shapes and devices alone.

usage: python -m tests.ecosystem.several_devices

FakeTensors refuse an operation on tensors of two devices, as the devices would. The devices are of a made-up kind, so
no GPU is needed; nothing can be computed on them, and `torch.tensor` must not try.
"""

import warnings
from itertools import product
from typing import Any

import torch
from accelerate import dispatch_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import AutoConfig, AutoModelForCausalLM

from parscale import StreamsConfig
from parscale.streams import attention
from parscale.streams.backbone import check_attention
from parscale.streams.families import give_streams, own_config, register_family

FIRST, SECOND = "far:0", "far:1"
B, T = 2, 7


class Far:
    """What torch asks of a kind of device."""

    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 2)
    manual_seed_all = staticmethod(lambda seed: None)
    _is_in_bad_fork = staticmethod(lambda: False)


def without_values(data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> Tensor:
    """`torch.tensor` under FakeTensorMode, which does not see the original."""
    made = tensor(data, dtype=dtype)
    far = device is not None and torch.device(device).type == "far"
    return torch.empty(made.shape, dtype=made.dtype, device=device) if far else made


def move(module: Any, device: str) -> None:
    """accelerate moves parameters by their class's constructor, which FakeTensors do not have."""
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            part.register_parameter(name, nn.Parameter(torch.empty_like(parameter, device=device)))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, torch.empty_like(buffer, device=device))


def dispatch(model: Any, **streams: str) -> Any:
    """The first layer on one device, the second and the final norm on the other."""
    where = {
        "model.embed_tokens": FIRST, "model.rotary_emb": FIRST, "model.layers.0": FIRST,
        "model.layers.1": SECOND, "model.norm": SECOND, "lm_head": SECOND,
    } | streams  # fmt: skip
    for name, device in where.items():
        move(model.get_submodule(name), device)
    if hasattr(model.model, "stream_embedding"):  # a map may name a parameter; accelerate then has no hook for it
        model.model.stream_embedding = nn.Parameter(torch.empty_like(model.model.stream_embedding, device=SECOND))
        where["model.stream_embedding"] = SECOND
    return dispatch_model(model, where, force_hooks=True)


def with_streams(model: Any, settings: StreamsConfig) -> Any:
    """`parallelize` without the batch that it runs: nothing can be measured here."""
    config_class, model_class = register_family(model.config.model_type)
    own_config(model).__class__ = config_class
    for key, value in settings.to_json().items():
        setattr(model.config, key, value)
    model.__class__ = model_class
    give_streams(model)
    model.config._attn_implementation = check_attention(model, model.config._attn_implementation)
    return model


def build() -> Any:
    config = AutoConfig.for_model(
        "qwen2", vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def run(model: Any) -> None:
    """A whole batch, a prompt, a cached token, and another p a row."""
    ids = torch.ones(B, T, dtype=torch.long, device=FIRST)
    mask, positions = torch.ones_like(ids), torch.arange(T, device=FIRST)[None].expand(B, T)
    model(input_ids=ids)
    prompt = model(input_ids=ids, attention_mask=mask, use_cache=True, logits_to_keep=1)
    model(input_ids=ids[:, :1], past_key_values=prompt.past_key_values)
    model(input_ids=ids, position_ids=positions, use_cache=True, logits_to_keep=1)
    model.set_streams([1, 3])
    model(input_ids=ids)


def main() -> None:
    cases = product(("own", "shared"), (("prefix",), ("prefix", "embedding", "lora", "rank1")), (True, False))
    for kv, diversify, streams_first in cases:
        settings = StreamsConfig(streams=3, prefix_tokens=4, diversify=diversify, kv=kv)
        if streams_first:  # the head on the wrong device, as a map made for memory alone may put it
            model = dispatch(with_streams(build(), settings), **{"model.aggregate_layer": FIRST})
        else:
            model = with_streams(dispatch(build()), settings)
            assert next(model.model.aggregate_layer.parameters()).device == torch.device(SECOND)
        run(model)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    _setup_privateuseone_for_python_backend("far", Far())
    tensor, torch.tensor = torch.tensor, without_values  # type: ignore[assignment]
    attention.Tensor = FakeTensor  # the attention asks for the class of a mask
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        main()
