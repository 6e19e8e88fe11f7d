"""vLLM's own models with their streams folded into heads, so that cache, scheduler and parallelism are vLLM's.

A step is T tokens. The linear layers see T·P rows, token-major; attention sees T tokens of P·H query heads. Prefix
keys and values lie once in the cache, in blocks that all requests see (vLLM's StaticSinkAttention). Streams that share
keys and values are plain grouped-query attention, with the blocks of a plain model. A model's forward is not touched:
its rotary embedding and attention are put into wrappers that fold, and three hooks duplicate, update and merge.
"""
# pyright: reportMissingImports=false

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention, StaticSinkAttention
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.selector import get_attn_backend

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.streams.aggregate import AggregationHead, stream_weights
from parscale.streams.diversify.lora import streams_at
from parscale.streams.merge import merge
from parscale.streams.tensors import belongs_to_streams

SMALLEST_BLOCK = 16


class _Streams:
    """Mixin in front of a causal LM of vLLM."""

    model: Any
    config: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        settings = StreamsConfig.from_json(vars(vllm_config.model_config.hf_config))
        check_servable(settings, vllm_config.cache_config.block_size)
        self.stream_places: dict[str, Callable[[Tensor], Any]] = {}
        self._put_streams_into_attention(settings, vllm_config)
        self._put_updates_into_projections(settings)
        self._duplicate_and_merge(settings)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """The streams' tensors by their own names, all others as vLLM loads them."""
        loaded: set[str] = set()

        def others() -> Iterable[tuple[str, Tensor]]:
            for name, tensor in weights:
                if not belongs_to_streams(name):
                    yield name, tensor
                    continue
                if name not in self.stream_places:
                    raise InputError(f"tensor {name!r} of the checkpoint has no place in a model of this config.json")
                self.stream_places[name](tensor)
                loaded.add(name)

        names = super().load_weights(others())  # type: ignore[misc]
        if missing := sorted(set(self.stream_places) - loaded):
            raise InputError(f"the checkpoint lacks {', '.join(missing[:8])}")
        return names | {name for name, _ in self.named_parameters() if belongs_to_streams(name)}  # type: ignore[attr-defined]

    def _put_streams_into_attention(self, settings: StreamsConfig, vllm_config: VllmConfig) -> None:
        for i, layer in enumerate(self.model.layers):
            module = layer.self_attn
            module.rotary_emb = FoldedRotary(module, settings)
            module.attn = FoldedAttention(module, settings, vllm_config)
            if settings.has_prefix:
                for part in ("k", "v"):
                    name = f"model.layers.{i}.self_attn.prefix_{part}"
                    self.stream_places[name] = functools.partial(module.attn.take_prefix, part)

    def _put_updates_into_projections(self, settings: StreamsConfig) -> None:
        if "lora" not in settings.diversifiers:
            return
        for i, layer in enumerate(self.model.layers):
            attention, mlp = layer.self_attn, layer.mlp
            widths = {"q_proj": attention.q_size, "k_proj": attention.kv_size, "v_proj": attention.kv_size}
            half = mlp.gate_up_proj.output_size_per_partition // 2
            for owner, linear, parts in (
                ("self_attn", attention.qkv_proj, widths),
                ("mlp", mlp.gate_up_proj, {"gate_proj": half, "up_proj": half}),
            ):
                heads = {"q_proj": attention.total_num_heads, "k_proj": attention.total_num_kv_heads}
                update = StreamUpdate(linear.input_size, parts, heads | {"v_proj": heads["k_proj"]}, settings)
                linear.stream_update = update
                linear.register_forward_hook(_add_update)
                for part in update.parts:
                    for factor in ("a", "b"):
                        name = f"model.layers.{i}.{owner}.{part}.stream_lora_{factor}"
                        self.stream_places[name] = functools.partial(update.take, part, factor)

    def _duplicate_and_merge(self, settings: StreamsConfig) -> None:
        hidden, backbone = self.config.hidden_size, self.model
        vectors = head = None
        if settings.has_embedding:
            vectors = backbone.stream_embedding = nn.Parameter(torch.empty(settings.streams, hidden), False)
            self.stream_places["model.stream_embedding"] = vectors.data.copy_
        if settings.has_head:
            head = backbone.aggregate_layer = AggregationHead(settings.streams, hidden).requires_grad_(False)
            for name, parameter in head.named_parameters():
                self.stream_places[f"model.aggregate_layer.{name}"] = parameter.data.copy_

        def duplicate(module: nn.Module, args: Any, embedded: Tensor) -> Tensor:
            rows = embedded[:, None].expand(-1, settings.streams, -1)  # (T, P, d)
            return (rows if vectors is None else rows + vectors).reshape(-1, hidden)

        def merge_streams(module: nn.Module, args: Any, output: Any) -> Any:
            if settings.streams == 1:
                return output
            by_stream = output[0].view(-1, settings.streams, hidden).transpose(0, 1)[:, None]  # (P, 1, T, d)
            merged = merge(by_stream, stream_weights(by_stream, head, settings.smoothing))[0]
            return merged, output[1]

        backbone.embed_tokens.register_forward_hook(duplicate)
        backbone.norm.register_forward_hook(merge_streams)


class Qwen2ParScaleForCausalLM(_Streams, Qwen2ForCausalLM):
    """qwen2_parscale, the released family."""


class Qwen3ParScaleForCausalLM(_Streams, Qwen3ForCausalLM):
    """qwen3_parscale."""


class LlamaParScaleForCausalLM(_Streams, LlamaForCausalLM):
    """llama_parscale."""


class MistralParScaleForCausalLM(_Streams, MistralForCausalLM):
    """mistral_parscale."""


def check_servable(settings: StreamsConfig, block_size: int) -> None:
    """Refuse, in one line, what vLLM's attention cannot compute.

    Raises:
        InputError: a prefix that does not fill blocks, streams that share keys but not their prefix, scales, or layers
            spread over several machines.
    """
    if settings.has_prefix and settings.prefix_tokens % block_size:
        fitting = [size for size in (128, 64, 32, SMALLEST_BLOCK) if settings.prefix_tokens % size == 0]
        advice = f"start with --block-size {fitting[0]}" if fitting else "use parscale serve instead"
        raise InputError(
            f"prefix_tokens={settings.prefix_tokens} does not fill blocks of {block_size} tokens of the cache; {advice}"
        )
    if settings.kv == "shared" and settings.has_prefix and settings.prefixes > 1:
        raise InputError(
            "kv='shared' with a prefix for every stream is not grouped-query attention; use parscale serve"
        )
    if "rank1" in settings.diversifiers:
        raise InputError("scales per stream ('rank1') do not go with vLLM's merged projections; use parscale serve")
    if get_pp_group().world_size > 1:
        raise InputError("pipeline parallelism is not supported with streams; use --tensor-parallel-size")


class _Fold:
    """How rows of T·P tokens become T tokens of more heads, and back. With shared keys the queries of all streams lie
    together for each key/value head, else each stream's heads do."""

    def __init__(self, attention: Any, settings: StreamsConfig) -> None:
        self.streams, self.shared = settings.streams, settings.kv == "shared"
        self.kv_heads, self.head_dim = attention.num_kv_heads, attention.head_dim

    def queries(self, rows: Tensor) -> Tensor:
        """(T·P, H·D) → (T, P·H·D)."""
        if self.shared:
            rows = rows.view(-1, self.streams, self.kv_heads, rows.shape[-1] // self.kv_heads).transpose(1, 2)
        return rows.reshape(-1, self.streams * rows.shape[-1] * (self.kv_heads if self.shared else 1))

    def keys(self, rows: Tensor) -> Tensor:
        """(T·P, Hk·D) → (T, P·Hk·D); with shared keys those of stream 0, (T, Hk·D)."""
        by_token = rows.view(-1, self.streams, rows.shape[-1])
        return by_token[:, 0].contiguous() if self.shared else by_token.flatten(1)

    def unfold(self, attended: Tensor) -> Tensor:
        """(T, P·H·D) → (T·P, H·D)."""
        width = attended.shape[-1] // self.streams
        if self.shared:
            attended = attended.view(-1, self.kv_heads, self.streams, width // self.kv_heads).transpose(1, 2)
        return attended.reshape(-1, width)


class FoldedRotary(nn.Module):
    """A layer's rotary embedding, given rows of T·P tokens and giving T tokens of folded heads."""

    def __init__(self, attention: Any, settings: StreamsConfig) -> None:
        super().__init__()
        self.inner, self.fold = attention.rotary_emb, _Fold(attention, settings)

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Positions (T,), queries (T·P, H·D) and keys (T·P, Hk·D)."""
        return self.inner(positions, self.fold.queries(query), self.fold.keys(key))


class FoldedAttention(nn.Module):
    """A layer's attention over folded heads, in the place of `attention.attn`."""

    def __init__(self, attention: Any, settings: StreamsConfig, vllm_config: VllmConfig) -> None:
        super().__init__()
        replaced = attention.attn
        # A layer's cache is found by its name, which the layer that is replaced has taken.
        del get_current_vllm_config().compilation_config.static_forward_context[replaced.layer_name]
        self.fold = _Fold(attention, settings)
        self.first_kv_head = _first_kv_head(attention)
        kv_streams = 1 if self.fold.shared else settings.streams
        shape: dict[str, Any] = {
            "num_heads": settings.streams * attention.num_heads,
            "head_size": attention.head_dim,
            "scale": attention.scaling,
            "num_kv_heads": kv_streams * attention.num_kv_heads,
            "cache_config": vllm_config.cache_config,
            "quant_config": vllm_config.quant_config,
            "prefix": replaced.layer_name,
        }
        self.taken: dict[str, Tensor] = {}
        if settings.has_prefix:
            backend = _with_small_blocks(
                get_attn_backend(attention.head_dim, torch.get_default_dtype(), vllm_config.cache_config.cache_dtype)
            )
            self.core: Any = PrefixAttention(sink_len=settings.prefix_tokens, attn_backend=backend, **shape)
            self.core.update_sink_kv(*torch.zeros(2, settings.prefix_tokens, shape["num_kv_heads"], attention.head_dim))
        else:
            self.core = Attention(**shape)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Queries and keys as `FoldedRotary` gives them, values (T·P, Hk·D); returns (T·P, H·D)."""
        return self.fold.unfold(self.core(query, key, self.fold.keys(value)))

    def take_prefix(self, part: str, bank: Tensor) -> None:
        """Keep this process's heads of `prefix_k` or `prefix_v`, (P or 1, Hk, n, D), as (n, P·Hk, D)."""
        own = bank[:, self.first_kv_head : self.first_kv_head + self.fold.kv_heads]
        held = self.core.sink_key if part == "k" else self.core.sink_value
        held.copy_(own.permute(2, 0, 1, 3).flatten(1, 2))


class PrefixAttention(StaticSinkAttention):
    """vLLM's static keys in front of every request, written by the attention implementation itself: theirs is a Triton
    kernel for GPUs."""

    def populate_sink_kv(self, self_kv_cache: Tensor) -> None:
        """Write the prefix into blocks 1 … n/block_size of this layer's cache, once."""
        device, first = self_kv_cache.device, self.block_size
        slots = torch.arange(first, first + self.sink_len, device=device, dtype=torch.long)
        keys, values = self.sink_key.to(device), self.sink_value.to(device)
        self.impl.do_kv_cache_update(self, keys, values, self_kv_cache, slots)
        self.sink_populated = True


class StreamUpdate(nn.Module):
    """The streams' LoRA of a merged projection: added to the output of every part, `k_proj` and `v_proj` of streams
    that share them for stream 0 alone.

    Args:
        inputs: features.
        widths: part → features of it that this process has.
        heads: part → heads in the whole model, where they may be fewer than processes.
        settings: the streams.
    """

    def __init__(self, inputs: int, widths: dict[str, int], heads: dict[str, int], settings: StreamsConfig) -> None:
        super().__init__()
        self.streams, self.widths, self.heads = settings.streams, widths, heads
        self.plain_first = settings.plain_first
        self.parts = []
        """Those that have an update in the checkpoint."""
        for part, width in widths.items():
            p = streams_at(part, settings)
            self.parts += [part] if p else []
            shapes = {"a": (p, inputs, settings.lora_rank), "b": (p, settings.lora_rank, width)}
            for factor, shape in shapes.items():
                self.register_parameter(f"stream_{part}_{factor}", nn.Parameter(torch.zeros(shape), False))

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Rows (T·P, inputs) and the projection's output (T·P, sum of widths)."""
        x = x.view(-1, self.streams, x.shape[-1]).transpose(0, 1)  # (P, T, inputs)
        added = []
        for part in self.widths:
            a, b = getattr(self, f"stream_{part}_a"), getattr(self, f"stream_{part}_b")
            update = x[: a.shape[0]] @ a @ b
            missing = self.streams - a.shape[0]
            added.append(nn.functional.pad(update, (0, 0, 0, 0, 0, missing)) if missing else update)
        return output + torch.cat(added, dim=-1).transpose(0, 1).reshape(output.shape)

    def take(self, part: str, factor: str, tensor: Tensor) -> None:
        """Keep this process's columns of a factor."""
        place = getattr(self, f"stream_{part}_{factor}")
        if factor == "b":
            processes, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
            copies = max(1, processes // self.heads.get(part, processes))
            first = rank // copies * place.shape[-1]
            tensor = tensor[..., first : first + place.shape[-1]]
        place.data.copy_(tensor)
        if self.plain_first and factor == "b":
            place.data[0] = 0


def _add_update(module: Any, args: tuple[Tensor, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
    return module.stream_update(args[0], output[0]), output[1]


def _first_kv_head(attention: Any) -> int:
    processes, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    total = attention.total_num_kv_heads
    return rank * attention.num_kv_heads if total >= processes else rank * total // processes


@functools.lru_cache
def _with_small_blocks(backend: Any) -> Any:
    """The attention backend, with blocks of 16 tokens allowed: its kernels take them, and 48 is 3 × 16."""

    class SmallBlocks(backend):
        @staticmethod
        def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
            return [MultipleOf(SMALLEST_BLOCK)]

        @staticmethod
        def get_name() -> str:
            return backend.get_name()

    return SmallBlocks
