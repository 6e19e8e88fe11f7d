"""The entry point by which vLLM learns of models with streams: their names, their heads, and a mended reservation.

Every process of vLLM calls `register` at its start. What it changes in vLLM it changes on tested versions only; on any
other, a model with streams is refused where it would be built, and plain models run as ever.
"""
# pyright: reportMissingImports=false

from typing import Any

import vllm
from torch import nn
from vllm import ModelRegistry

from parscale.errors import InputError
from parscale.streams.families import SUFFIX, register_family

TESTED = ("0.32.0",)
FAMILIES = ("qwen2", "qwen3", "llama", "mistral")


def register() -> None:
    """Make `{Family}ParScaleForCausalLM` known to vLLM, for all of `FAMILIES`."""
    tested = vllm.__version__.split("+")[0] in TESTED
    if tested:
        _reserve_prefix_blocks()
    for family in FAMILIES:
        _, model_class = register_family(family)
        if model_class.__name__ not in ModelRegistry.get_supported_archs():
            place = f"parscale.serve.vllm_model:{model_class.__name__}" if tested else Untested
            ModelRegistry.register_model(model_class.__name__, place)


class Untested(nn.Module):
    """What a model with streams is on a vLLM that this plugin was not tested with."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        raise InputError(
            f"{vllm_config.model_config.hf_config.model_type.removesuffix(SUFFIX)} with streams: the plugin was tested "
            f"with vLLM {' and '.join(TESTED)}, this is {vllm.__version__}; install a tested one"
        )

    def embed_input_ids(self, input_ids: Any) -> Any:
        raise NotImplementedError

    def forward(self, input_ids: Any, positions: Any) -> Any:
        raise NotImplementedError

    def compute_logits(self, hidden_states: Any) -> Any:
        raise NotImplementedError


def _reserve_prefix_blocks() -> None:
    """vLLM 0.32 writes a layer's static keys into blocks 1 … n/block_size of the cache, but its manager of such caches
    takes no argument that is new there, and no longer keeps requests out of those blocks. Mend both."""
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager, SinkFullAttentionManager

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        FullAttentionManager.__init__(self, *args, **kwargs)
        _take_first_blocks(self)

    SinkFullAttentionManager.__init__ = __init__


def _take_first_blocks(manager: Any) -> None:
    """Without this, the second step of any request overwrites its own prefix."""
    count = manager.kv_cache_spec.sink_len // manager.block_size
    manager.sink_blocks = manager.block_pool.free_block_queue.popleft_n(count)
    taken = [block.block_id for block in manager.sink_blocks]
    if taken != list(range(1, count + 1)):
        raise RuntimeError(f"the prefix belongs in blocks 1 to {count} of the cache; free were {taken}")
    manager.block_pool.num_gpu_blocks -= count  # "nothing is in use" is told by counting blocks
