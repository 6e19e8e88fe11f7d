"""What the plain model did on one batch, from which the diversifiers find a good start."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

QUERIES = 2048
"""Enough to fit keys of a few hundred channels to; a long calibration batch would only cost time and memory."""


@dataclass(frozen=True)
class LayerStatistics:
    """What one attention module attends with on a calibration batch, heads apart; keys and queries after RoPE.

    keys, values: (Hk, B·T, Dk) and (Hk, B·T, Dv), those of the batch, row after row.
    queries: (Hk, N, Dk), query tokens of all heads that share a key/value head, scaled as the scores want them; at most
        `QUERIES` a head, evenly chosen.
    log_sums: (Hk, N), for each of them the log of the sum of exp(score) over the real tokens that it sees.
    """

    keys: Float[Tensor, "hk tokens dk"]
    values: Float[Tensor, "hk tokens dv"]
    key_mean: Float[Tensor, "hk dk"]
    key_std: Float[Tensor, "hk dk"]
    value_mean: Float[Tensor, "hk dv"]
    value_std: Float[Tensor, "hk dv"]
    queries: Float[Tensor, "hk queries dk"]
    log_sums: Float[Tensor, "hk queries"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Hk, Dk, Dv): key/value heads, size of a key, size of a value."""
        return (self.key_mean.shape[0], self.key_mean.shape[1], self.value_mean.shape[1])


@dataclass(frozen=True)
class Calibration:
    """One batch through the plain model.

    Attributes:
        ids: the batch.
        logits: what the plain model predicted.
        layers: attention module name, within the backbone → statistics; empty if no module reaches transformers'
            attention interface.
    """

    ids: Int[Tensor, "b t"]
    logits: Float[Tensor, "b t v"]
    layers: Mapping[str, LayerStatistics]


def describe(query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None) -> LayerStatistics:
    """Statistics of one attention call: query (B, H, T, Dk), key (B, Hk, T, Dk), value (B, Hk, T, Dv).

    Args:
        mask: the call's own; if it is no tensor, the tokens see all before them.
        scaling: what the scores are multiplied by; 1/√Dk if None.
    """
    key_heads = key.transpose(0, 1).flatten(1, 2).float()  # (Hk, B·T, Dk)
    value_heads = value.transpose(0, 1).flatten(1, 2).float()
    grouped = query.unflatten(1, (key.shape[1], -1)).float()  # (B, Hk, G, T, Dk)
    grouped = grouped * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = grouped @ key[:, :, None].float().mT  # (B, Hk, G, T, T)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if type(mask) is Tensor:
        seen = seen & (mask if mask.dtype == torch.bool else mask == 0)[:, :, None]
    log_sums = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)  # (B, Hk, G, T)
    queries, log_sums = (x.transpose(0, 1).flatten(1, 3) for x in (grouped, log_sums))
    every = -(-queries.shape[1] // QUERIES)
    return LayerStatistics(
        key_heads,
        value_heads,
        key_heads.mean(1),
        key_heads.std(1),
        value_heads.mean(1),
        value_heads.std(1),
        queries[:, ::every],
        log_sums[:, ::every],
    )


def random_tokens(model: Any, rows: int = 4, length: int = 64) -> Int[Tensor, "b t"]:
    """The same token ids on every call."""
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=draw).to(model.device)


def own_text(model: Any) -> Int[Tensor, "b t"]:
    """What the model itself writes: the nearest thing to real text that needs no data.

    Every other row begins as its texts do, if it knows a token for that; the others lose the few tokens that
    follow a random one, and begin in the middle of something.
    """
    ids = random_tokens(model, rows=8, length=128)
    length, ids = ids.shape[1], ids[:, :1]
    start = model.generation_config.bos_token_id
    if start is not None and start >= model.config.vocab_size:  # a default of the family's, of another vocabulary
        start = None
    if start is not None:
        ids[::2] = start
    step, cache = ids, None
    devices = [model.device] if model.device.type == "cuda" else []
    with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(0)
        for _ in range(length - 1):
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            sampled = output.logits[:, -1].float().softmax(-1).multinomial(1)
            ids, cache = torch.cat([ids, sampled], dim=1), output.past_key_values
            step = ids if cache is None else sampled
    lost = min(8, length // 2)
    beginnings, middles = ids[:, : length - lost], ids[:, lost:]
    return middles if start is None else torch.cat([beginnings[::2], middles[1::2]])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """While it lasts, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
