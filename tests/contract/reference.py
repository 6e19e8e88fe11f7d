"""The truth of the contract suite: P separate passes of the plain model, one stream's prefix concatenated by hand and
its update added to the plain model's weights.

With shared keys and values, stream 0's pass leaves those of every layer to the passes that follow.

Nothing here calls parscale. The plain class runs with an attention function of the test's own, in float64 throughout;
then the head, the smoothing and the weighted sum are written out. The same code in float32 gives the tolerance.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

Prefix = dict[int, tuple[Tensor, Tensor]]
"""Layer index → one stream's keys (H, n, Dk) and values (H, n, Dv)."""


@dataclass(frozen=True)
class Truth:
    """What P separate passes give.

    Attributes:
        logits: (B, T, V), float64.
        streams: final hidden states (P, B, T, d), float64.
        weights: (P, B, T), float64.
        router_logits: one entry (B·T, experts) a stream and layer, if `output_router_logits` was asked for.
        tolerance: the largest difference that float32 arithmetic alone makes to `logits`, times `SLACK`.
    """

    logits: Tensor
    streams: Tensor
    weights: Tensor
    router_logits: list[Tensor]
    tolerance: float

    def close(self, logits: Tensor, where: Any = ...) -> None:
        """Assert that `logits` (B, T, V), or the part of them that `where` indexes, are the truth."""
        torch.testing.assert_close(logits.double(), self.logits[where], rtol=0, atol=self.tolerance)


SLACK = 8
"""Another order of summation, a handful of inputs: the largest of one sample of float32 errors against another's."""


def truth(plain: PreTrainedModel, model: Any, ids: Tensor, streams: int | None = None, **inputs: Any) -> Truth:
    """Run the active streams of `model` one by one through `plain`, of the family's own class.

    Args:
        plain: the model before `parallelize`.
        model: the parallelized one; only its parameters and `config.json` entries are read.
        ids: (B, T).
        streams: p, the first p streams (all by default).
        inputs: the plain model's own, such as `attention_mask`.
    """
    p = model.config.parscale_n if streams is None else streams
    exact = _passes(plain, model, ids, p, torch.float64, inputs)
    single = _passes(plain, model, ids, p, torch.float32, inputs)
    error = (single[0].double() - exact[0]).abs().max().item()
    return Truth(*exact, tolerance=SLACK * error)


def _passes(
    plain: PreTrainedModel, model: Any, ids: Tensor, p: int, dtype: torch.dtype, inputs: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    plain = copy.deepcopy(plain).to(dtype).eval()
    plain.config._attn_implementation = NAME
    plain.config._experts_implementation = "eager"  # grouped matrix products know no float64
    hidden, router_logits = [], []
    shared = (model.config.parscale or {}).get("kv") == "shared"
    with _AllInFloat64() if dtype == torch.float64 else nullcontext(), torch.no_grad():
        _current.first = {}
        for stream in range(p):
            _current.records, _current.reads = shared and stream == 0, shared and stream > 0
            _current.prefix = prefix_of_stream(model, stream, dtype)
            one = with_weights_of_stream(plain, model, stream)
            embeds = plain.get_input_embeddings()(ids)
            if (vectors := getattr(model.base_model, "stream_embedding", None)) is not None:
                embeds = embeds + vectors[stream].to(dtype)
            output = one.base_model(inputs_embeds=embeds, use_cache=False, **inputs)
            hidden.append(output.last_hidden_state)
            router_logits += output.get("router_logits") or []
        streams = torch.stack(hidden)  # (P, B, T, d)
        weights = _weights(model, streams, p)
        merged = sum(w[..., None] * h for w, h in zip(weights, streams, strict=True))
        logits = plain.get_output_embeddings()(merged)
        if (cap := getattr(plain.config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
    return logits, streams, weights, router_logits


def prefix_of_stream(model: Any, stream: int, dtype: torch.dtype) -> Prefix:
    """One stream's prefixes, by layer index."""
    return {
        module.layer_idx: tuple(of_stream(bank, stream, dtype) for bank in (module.prefix_k, module.prefix_v))
        for module in model.modules()
        if hasattr(module, "prefix_k")
    }


def of_stream(bank: Tensor, stream: int, dtype: torch.dtype) -> Tensor:
    """A stream's entry of a bank, or the only one: a prefix for all streams, keys and values of stream 0."""
    return bank[min(stream, len(bank) - 1)].detach().to(dtype)


def with_weights_of_stream(plain: PreTrainedModel, model: Any, stream: int) -> PreTrainedModel:
    """A copy whose weights are diag(s_in)·(W + A·B)·diag(s_out), as far as the stream has such an update."""
    one = copy.deepcopy(plain)
    if stream == 0 and (model.config.parscale or {}).get("plain_first"):
        return one
    for name, module in model.base_model.named_modules():
        dtype = next(plain.parameters()).dtype
        own = {key: of_stream(p, stream, dtype) for key, p in module.named_parameters(recurse=False) if key in UPDATES}
        if not own:
            continue
        changed: Any = one.base_model.get_submodule(name)
        transposed = isinstance(changed, nn.Linear)  # (out, in); GPT-2's Conv1D has (in, out)
        weight = changed.weight.data.T if transposed else changed.weight.data
        if "stream_lora_a" in own:
            weight = weight + own["stream_lora_a"] @ own["stream_lora_b"]
        if "stream_scale_in" in own:
            weight = torch.diag(own["stream_scale_in"]) @ weight @ torch.diag(own["stream_scale_out"])
            if changed.bias is not None:
                changed.bias.data *= own["stream_scale_out"]
        changed.weight.data = (weight.T if transposed else weight).contiguous()
    return one


UPDATES = ("stream_lora_a", "stream_lora_b", "stream_scale_in", "stream_scale_out")


def _weights(model: Any, streams: Tensor, p: int) -> Tensor:
    """Equation 4 by hand, for the first p of P streams, the others reading as zero. (P, B, T)."""
    dtype, head, total = streams.dtype, model.base_model.aggregate_layer, model.config.parscale_n
    if head is None or p == 1:
        return torch.full(streams.shape[:3], 1 / p, dtype=dtype)
    padded = torch.zeros(total, *streams.shape[1:], dtype=dtype)
    padded[:p] = streams
    x = torch.stack(list(padded), dim=-1).flatten(-2)  # "b s (h p)": hidden-major, stream-minor
    x = x @ head[0].weight.to(dtype).T + head[0].bias.to(dtype)
    x = x * torch.sigmoid(x)
    x = (x @ head[2].weight.to(dtype).T + head[2].bias.to(dtype))[..., :p]
    exponentials = torch.exp(x - x.max(-1, keepdim=True).values)
    shares = (exponentials / exponentials.sum(-1, keepdim=True)).permute(2, 0, 1)
    smoothing = model.config.parscale_attn_smooth
    return shares * (1 - smoothing) + smoothing / p


class _Current:
    prefix: Prefix
    first: dict[int, tuple[Tensor, Tensor]]
    records = reads = False


_current = _Current()
NAME = "one-stream-reference"


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Textbook attention over [prefix; keys], with whatever the family adds to it: grouped heads, soft caps, sinks."""
    if _current.records:
        _current.first[module.layer_idx] = key, value
    if _current.reads:
        key, value = _current.first[module.layer_idx]
    if module.layer_idx in _current.prefix:
        keys, values = _current.prefix[module.layer_idx]
        rows = key.shape[0]
        key = torch.cat([keys.expand(rows, *keys.shape), key], dim=2)
        value = torch.cat([values.expand(rows, *values.shape), value], dim=2)
        mask = torch.cat([torch.zeros(*mask.shape[:3], keys.shape[1], dtype=mask.dtype), mask], dim=3)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(mask < -1, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    shares = torch.softmax(scores, dim=-1)[..., : key.shape[2]]
    return torch.einsum("bhts,bhsd->bthd", shares, value).contiguous(), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


class _AllInFloat64(TorchFunctionMode):
    """Undoes the casts to float32 inside norms, rotary embeddings, softmaxes and routers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            return args[0].double()
        args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        kwargs = {k: torch.float64 if a is torch.float32 else a for k, a in (kwargs or {}).items()}
        return func(*args, **kwargs)
