"""A small model, plain or with streams, and decoding written out without a cache."""

from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

import parscale
from parscale import StreamsConfig

VOCABULARY, CONTEXT, NEW = 97, 128, 8


def build(model_type: str = "qwen2", **config: Any) -> Any:
    """A plain model of random weights, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        settings = {
            "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": CONTEXT,
            "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0,
        }  # fmt: skip
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(settings | config))).eval()


def with_streams(model: Any, **streams: Any) -> Any:
    """Streams that differ, with updates that are not zero, and a head whose weights depend on the token."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        parscale.parallelize(model, StreamsConfig(**{"streams": 4, "prefix_tokens": 5} | streams))
        head = model.base_model.aggregate_layer
        if head is not None:
            head[2].weight.data.normal_()
            head[2].bias.data.normal_()
        for name, parameter in model.named_parameters():
            if name.endswith("stream_lora_b"):
                parameter.data.normal_(std=0.3)
    return model


@torch.no_grad()
def uncached(model: Any, ids: Tensor, new: int = NEW) -> Tensor:
    """The definition of greedy decoding: the whole sequence anew for each token, no cache, no padding."""
    for _ in range(new):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids


def greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    """`generate` without sampling, `NEW` tokens."""
    mask = options.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, **{"max_new_tokens": NEW, "do_sample": False} | options)
