"""The streams folded into attention heads: what an inference engine gets, an ordinary decoder over T tokens.

Knows which models can be folded, and the order of the folded heads. Linear layers see (B, T, P, d), that is B·T·P rows,
so the weights are read once for all streams; attention sees T tokens with P·H query heads over P·Hk key/value heads, or
over the Hk of stream 0 where `kv="shared"`; the aggregation head is inside. Nothing else of the engine has to change.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from parscale.errors import InputError
from parscale.streams.aggregate import stream_weights
from parscale.streams.backbone import streams_of
from parscale.streams.merge import merge
from parscale.streams.tensors import is_wrapped

FAMILIES = ("qwen2", "qwen3", "llama", "mistral")
"""Rotary positions, grouped-query attention over all tokens, RMS norms before attention and a gated MLP."""

INPUTS = ("input_ids", "attention_mask", "position_ids")

Prefix = Literal["constant", "placeholders"]
"""How the prefix enters. "constant": as constants in front of the keys and values, outside the cache. "placeholders":
the caller puts n tokens `placeholder` in front of its own; their keys and values in the cache are overwritten with the
prefix, and the tokens behind them count positions from 0. That is for engines that own attention and its cache."""


class FoldedDecoder(nn.Module):
    """A causal LM as one graph with the KV cache as inputs and outputs: what `torch.export` is given.

    Its parameters are the model's own, not copies. The active streams (`model.set_streams`) are exported.

    Args:
        model: a causal LM of `FAMILIES`, plain or with streams, in evaluation mode.
        prefix: see `Prefix`.
        placeholder: the token id of "placeholders"; at or above the vocabulary's size the logits get columns up to it.
        padding: another token id that may stand at the first n positions: padding on the left.

    Raises:
        InputError: the model cannot be folded; says why.
    """

    def __init__(
        self, model: Any, prefix: Prefix = "constant", placeholder: int | None = None, padding: int | None = None
    ) -> None:
        super().__init__()
        check_foldable(model)
        settings, backbone, config = streams_of(model), model.base_model, model.config
        self.streams: int = getattr(model, "streams", 1)
        self.prefix = prefix
        self.prefix_tokens = settings.prefix_tokens if settings.has_prefix else 0
        self.allowed = [t for t in (placeholder, padding) if t is not None]
        self.smoothing = settings.smoothing
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_streams = 1 if settings.kv == "shared" else self.streams
        self.kv_heads = self.kv_streams * config.num_key_value_heads
        self.heads = self.streams * config.num_attention_heads
        self.vocab_size = config.vocab_size
        self.missing_logits = 0 if placeholder is None else max(0, placeholder + 1 - config.vocab_size)

        self.embed = backbone.embed_tokens
        self.rotary = backbone.rotary_emb
        vectors = getattr(backbone, "stream_embedding", None)
        self.vectors = None if vectors is None else nn.Parameter(vectors.detach()[: self.streams], requires_grad=False)
        self.layers = nn.ModuleList(_Layer(layer, self, config.num_key_value_heads) for layer in backbone.layers)
        self.norm = backbone.norm
        self.aggregation = getattr(backbone, "aggregate_layer", None)
        self.lm_head = model.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """Run T tokens behind S − T cached ones.

        Args:
            input_ids: (B, T).
            attention_mask: (B, S), 1 for real tokens and placeholders.
            position_ids: (B, T), from 0 at the first real token or placeholder.
            past: keys and values of each layer in turn, (B, kv_heads, S − T, head_dim).

        Returns:
            Logits (B, T, V), then each layer's keys and values (B, kv_heads, S, head_dim).
        """
        if self.prefix == "placeholders" and self.prefix_tokens:
            slots, positions = position_ids, (position_ids - self.prefix_tokens).clamp(min=0)
        else:
            slots, positions = None, position_ids
        x = self.embed(input_ids.clamp(max=self.vocab_size - 1) if self.missing_logits else input_ids)
        x = x[:, :, None].expand(-1, -1, self.streams, -1)  # (B, T, P, d)
        if self.vectors is not None:
            x = x + self.vectors.to(x.dtype)
        if slots is not None:
            x = self._spoil_without_placeholders(x, input_ids, slots)
        cos, sin = self.rotary(x, positions)  # (B, T, D) each
        seen = _causal(attention_mask, input_ids.shape[1])
        present: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            x, key, value = layer(x, (cos[:, None], sin[:, None]), seen, slots, past[2 * i], past[2 * i + 1])
            present += key, value
        hidden = self.norm(x).permute(2, 0, 1, 3)  # (P, B, T, d)
        if self.streams > 1:
            merged = merge(hidden, stream_weights(hidden, self.aggregation, self.smoothing))
        else:
            merged = hidden[0]
        logits = self.lm_head(merged)
        if self.missing_logits:
            logits = F.pad(logits, (0, self.missing_logits), value=torch.finfo(logits.dtype).min)
        return logits, *present

    @property
    def cache_names(self) -> list[str]:
        """Names of `past`, as engines expect them."""
        parts = ("key", "value")
        return [f"past_key_values.{layer}.{part}" for layer in range(len(self.layers)) for part in parts]

    def example(self) -> tuple[Any, ...]:
        """Arguments: three tokens behind five in a batch of two. No size is 1, which an export would take as fixed."""
        batch, tokens, cached = 2, 3, 5
        ids = torch.ones(batch, tokens, dtype=torch.long)
        mask = torch.ones(batch, cached + tokens, dtype=torch.long)
        positions = torch.arange(cached, cached + tokens).repeat(batch, 1)
        past = [torch.zeros(batch, self.kv_heads, cached, self.head_dim) for _ in self.cache_names]
        return ids, mask, positions, past

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """For `torch.export`: batch, tokens and cached tokens may vary."""
        auto = torch.export.Dim.AUTO
        return (
            {0: auto, 1: auto},
            {0: auto, 1: auto},
            {0: auto, 1: auto},
            [{0: auto, 2: auto} for _ in self.cache_names],
        )

    def _spoil_without_placeholders(self, x: Tensor, input_ids: Tensor, slots: Tensor) -> Tensor:
        """NaN where a prompt without its placeholders would be overwritten: such a caller must not get fluent text."""
        wrong = slots < self.prefix_tokens
        for token in self.allowed:
            wrong = wrong & (input_ids != token)
        return torch.where(wrong[..., None, None], torch.full_like(x, torch.nan), x)


def check_foldable(model: Any) -> None:
    """Refuse, in one line, a model whose graph `FoldedDecoder` would get wrong.

    Raises:
        InputError: the family, its positions, its windows or its kind of streams are not among those that fold, or its
            weights are not all in the linear layers and banks: quantised, in a LoRA, in a prefix generator.
    """
    config, settings = model.config, streams_of(model)
    family, name = config.model_type.removesuffix("_parscale"), type(model).__name__
    if family not in FAMILIES:
        raise InputError(f"{name}: model type {family!r} cannot be folded for an engine; those that can are {FAMILIES}")
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windowed = family == "mistral" and config.sliding_window is not None
    if kinds != {"full_attention"} or windowed:
        raise InputError(f"{name} attends within a sliding window; only layers of full attention can be folded")
    rope = (config.rope_parameters or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        raise InputError(f"{name}: rope_type={rope!r} changes with the length of the text, which a graph cannot do")
    if settings.kv == "shared" and settings.has_prefix and settings.prefixes > 1:
        raise InputError(
            "kv='shared' with a prefix for every stream is not grouped-query attention, so no engine runs it; "
            "train with shared_prefix=True, or with 'lora' or 'embedding' alone in diversify"
        )
    packed = any("scales" in key or "packed" in key or "qdata" in key for key in model.state_dict())
    if packed or getattr(model, "is_quantized", False):
        raise InputError(f"{name} holds quantised weights; export the model as it was before, with --weights")
    if is_wrapped(model):
        raise InputError(f"{name} has a LoRA beside its weights; merge it with merge_and_unload() and export that")
    if getattr(model.base_model, "prefix_generator", None) is not None:
        raise InputError(f"{name} still generates its prefixes; save it, load it again and export that")


def fold_prefix(bank: Tensor, streams: int) -> Tensor:
    """Keys or values of the prefix as the folded heads want them: (P, Hk, n, D) → (P'·Hk, n, D), stream-major; P' is
    the number of prefixes that `streams` active streams have (1 where they share one)."""
    return bank.detach()[:streams].flatten(0, 1)


class _Layer(nn.Module):
    def __init__(self, layer: Any, decoder: FoldedDecoder, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention = _Attention(layer.self_attn, decoder, kv_heads)
        self.mlp = _MLP(layer.mlp, decoder.streams)

    def forward(self, x: Tensor, *context: Any) -> tuple[Tensor, Tensor, Tensor]:
        attended, key, value = self.attention(self.attention_norm(x), *context)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), key, value


class _MLP(nn.Module):
    def __init__(self, mlp: Any, streams: int) -> None:
        super().__init__()
        self.gate, self.up = _Projection(mlp.gate_proj, streams), _Projection(mlp.up_proj, streams)
        self.down, self.activation = _Projection(mlp.down_proj, streams), mlp.act_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x)) * self.up(x))


class _Projection(nn.Module):
    """A linear layer on (B, T, P, in), with each stream's own LoRA and scales where it has them: y_p =
    ((x_p·s_in)·(W + A_p·B_p) + b)·s_out. Without the model's hooks, which count on another order of the rows."""

    stream_lora_a: Tensor | None
    stream_lora_b: Tensor | None
    stream_scale_in: Tensor | None
    stream_scale_out: Tensor | None

    def __init__(self, linear: Any, streams: int) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        for name in ("stream_lora_a", "stream_lora_b", "stream_scale_in", "stream_scale_out"):
            tensor = getattr(linear, name, None)
            setattr(self, name, None if tensor is None else nn.Parameter(tensor.detach()[:streams], False))
        if self.stream_lora_b is not None and linear.stream_state.config.plain_first:
            self.stream_lora_b.data = self.stream_lora_b.data.clone()  # the model's own stays as it is
            self.stream_lora_b.data[0] = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.stream_scale_in is not None:
            x = x * self.stream_scale_in
        y = F.linear(x, self.weight, self.bias)
        if self.stream_lora_a is not None and self.stream_lora_b is not None:
            y = y + torch.einsum("btpi,pir,pro->btpo", x, self.stream_lora_a, self.stream_lora_b)
        return y if self.stream_scale_out is None else y * self.stream_scale_out


class _Attention(nn.Module):
    prefix_k: Tensor
    prefix_v: Tensor

    def __init__(self, attention: Any, decoder: FoldedDecoder, kv_heads: int) -> None:
        super().__init__()
        self.streams, self.kv_streams, self.head_dim = decoder.streams, decoder.kv_streams, decoder.head_dim
        self.own_heads = kv_heads  # Hk, of one stream
        self.kv_heads, self.heads = decoder.kv_heads, decoder.heads
        self.scaling = attention.scaling
        self.query = _Projection(attention.q_proj, decoder.streams)
        self.key = _Projection(attention.k_proj, decoder.kv_streams)
        self.value = _Projection(attention.v_proj, decoder.kv_streams)
        self.out = _Projection(attention.o_proj, decoder.streams)
        self.query_norm = getattr(attention, "q_norm", None)
        self.key_norm = getattr(attention, "k_norm", None)
        self.prefix, self.prefix_tokens = decoder.prefix, decoder.prefix_tokens
        if self.prefix_tokens:
            self.register_buffer("prefix_k", fold_prefix(attention.prefix_k, decoder.streams)[None].clone())
            self.register_buffer("prefix_v", fold_prefix(attention.prefix_v, decoder.streams)[None].clone())

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], seen: Tensor, slots: Tensor | None, *past: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        query = self._queries(x, *rotary)  # (B, heads, T, D)
        source = x[:, :, : self.kv_streams]
        key = _rotate(self._keys(self.key(source), self.key_norm), *rotary)  # (B, kv_heads, T, D)
        value = self._keys(self.value(source), None)
        if slots is not None:
            key, value = self._overwrite(key, self.prefix_k, slots, x), self._overwrite(value, self.prefix_v, slots, x)
        key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)  # (B, kv_heads, S, D)
        if self.prefix == "constant":
            attended = self._attend_with_constants(query, key, value, seen)
        else:
            attended = self._attend_for_engines(query, key, value, seen)
        return self.out(self._by_stream(attended)), key, value

    def _queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Query heads in the order that lets each key/value head serve a run of them: stream-major where every stream
        has its own, key/value-head-major where they share."""
        query = self.query(x).unflatten(-1, (self.own_heads, -1, self.head_dim))  # (B, T, P, Hk, G, D)
        query = query if self.query_norm is None else self.query_norm(query)
        if self.kv_streams < self.streams:
            query = query.transpose(2, 3)  # (B, T, Hk, P, G, D)
        return _rotate(query.flatten(2, 4).transpose(1, 2), cos, sin)

    def _by_stream(self, attended: Tensor) -> Tensor:
        """Undo `_queries`: (B, heads, T, D) → (B, T, P, H·D)."""
        heads = attended.transpose(1, 2)
        if self.kv_streams < self.streams:
            return heads.unflatten(2, (self.own_heads, self.streams, -1)).transpose(2, 3).flatten(3)
        return heads.unflatten(2, (self.streams, -1)).flatten(3)

    def _keys(self, projected: Tensor, norm: Any) -> Tensor:
        """(B, T, P', Hk·D) → (B, P'·Hk, T, D)."""
        heads = projected.unflatten(-1, (self.own_heads, self.head_dim))
        heads = heads if norm is None else norm(heads)
        return heads.flatten(2, 3).transpose(1, 2)

    def _overwrite(self, own: Tensor, bank: Tensor, slots: Tensor, x: Tensor) -> Tensor:
        """The prefix's n entries at the first n positions, `own` behind them; NaN if `x` is."""
        chosen = bank[0].transpose(0, 1)[slots.clamp(max=self.prefix_tokens - 1)].transpose(1, 2)  # (B, kv_heads, T, D)
        spoiled = (x[:, :, 0, :1] * 0)[:, None]  # (B, 1, T, 1)
        return torch.where((slots < self.prefix_tokens)[:, None, :, None], chosen + spoiled, own)

    def _attend_with_constants(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """softmax([q·prefix_k, q·k])·[prefix_v; v]. The scores are concatenated, not the keys, and no head is
        repeated: the cache is read once and never copied."""
        tokens, group = query.shape[2], self.heads // self.kv_heads
        grouped = (query * self.scaling).reshape(query.shape[0], self.kv_heads, group * tokens, self.head_dim)
        scores = (grouped @ key.transpose(-1, -2)).unflatten(2, (group, tokens))  # (B, kv_heads, G, T, S)
        scores = torch.where(seen[:, None], scores, torch.finfo(scores.dtype).min).flatten(2, 3)
        if not self.prefix_tokens:
            out = scores.softmax(-1) @ value
        else:
            n = self.prefix_tokens
            weights = torch.cat([grouped @ self.prefix_k.transpose(-1, -2), scores], dim=-1).softmax(-1)
            out = weights[..., n:] @ value + weights[..., :n] @ self.prefix_v
        return out.reshape(query.shape)

    def _attend_for_engines(self, query: Tensor, key: Tensor, value: Tensor, seen: Tensor) -> Tensor:
        """Attention in the form that OpenVINO looks for when it puts its paged attention in the place of it."""
        group = self.heads // self.kv_heads
        key, value = (
            x[:, :, None].expand(-1, -1, group, -1, -1).reshape(x.shape[0], self.heads, -1, self.head_dim)
            for x in (key, value)
        )
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scaling)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * sin


def _causal(attention_mask: Tensor, tokens: int) -> Tensor:
    """(B, S) → (B, 1, T, S): real tokens that are not behind the query."""
    length = attention_mask.shape[1]
    column = torch.arange(length, device=attention_mask.device)
    row = torch.arange(tokens, device=attention_mask.device) + (length - tokens)
    return (column <= row[:, None])[None, None] & (attention_mask[:, None, None] > 0)
