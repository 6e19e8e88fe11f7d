"""A p for every token: one stream for easy tokens, P for hard ones, told apart by the entropy of stream 0's prediction.

Not in the paper. It needs shared keys and values: only then does the KV cache not depend on p, and every token may
have its own.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache

from parscale.errors import InputError


@dataclass(frozen=True)
class HardTokens:
    """Run `streams` streams where stream 0 alone predicts with an entropy above `entropy`, and stream 0 elsewhere.

    A hard token costs a second pass, of the streams behind stream 0 alone: they read the keys and values that it has
    just made. Give it to `set_streams`, or to `generate` as `streams`. For inference alone: a forward pass has to be
    under `torch.no_grad()`.

    Args:
        entropy: of the prediction, in nats; 0 makes every token hard.
        streams: p for hard tokens.

    Raises:
        InputError: a negative entropy, or fewer than two streams.
    """

    entropy: float
    streams: int

    def __post_init__(self) -> None:
        if not self.entropy >= 0:
            raise InputError(f"entropy={self.entropy!r} is not accepted; give nats >= 0")
        if isinstance(self.streams, bool) or not isinstance(self.streams, int) or self.streams < 2:
            raise InputError(f"streams={self.streams!r} is not accepted for hard tokens; give an integer >= 2")


@dataclass(frozen=True)
class FirstStream:
    """What stream 0 left of the tokens that the others run over after it, in some rows of the batch. Attention modules
    are given it in the KV cache's place, of which they call nothing but `update`.

    Args:
        hidden: its final hidden state there, (b, T, d).
        cache: of the whole batch, with these tokens in it.
        rows: which of the batch these are, (b,).
    """

    hidden: Float[Tensor, "b t d"]
    cache: Cache
    rows: Int[Tensor, " b"]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "b h s d"], Float[Tensor, "b h s e"]]:
        """All that the rows attend to; the module's own keys and values are dropped. Only of a part of the batch it is
        a copy."""
        whole: Any = self.cache.layers[layer_idx]
        if len(self.rows) == len(whole.keys):
            return whole.keys, whole.values
        rows = self.rows.to(whole.keys.device)
        return whole.keys[rows], whole.values[rows]


@dataclass(frozen=True)
class AdaptiveLoss:
    """What a threshold gives. `share` of the tokens are hard; `loss` is the mean over all, in nats per token."""

    entropy: float
    share: float
    loss: float


def run_hard_rows(
    forward: Callable[..., Any], state: Any, run: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """After the causal LM ran stream 0: run the others if a token is hard, and take the prediction of all there.

    Args:
        forward: the causal LM's, as its family has it.
        state: the model's `StreamState`.
        run: the `Run` that has ended.
        args: what `forward` was given.
        kwargs: the same, by name.
        output: what it gave.

    Raises:
        InputError: gradients are on, a cache that cannot give back its last tokens, labels, or an output that is a
            tuple.
    """
    if torch.is_grad_enabled():
        raise InputError(
            "hard tokens are for inference: run under torch.no_grad(), or call set_streams(p) with a number"
        )
    if kwargs.get("labels") is not None or isinstance(output, tuple):
        raise InputError("hard tokens have no loss, and no tuple of outputs: leave out labels and return_dict=False")
    hard = prediction_entropy(output.logits) > run.adaptive.entropy  # (B, T)
    rows = hard.any(dim=1).nonzero().flatten()
    if not len(rows):
        return output
    if len(args) == 1:
        args, kwargs = (), kwargs | {"input_ids": args[0]}
    if args or any(kwargs[name] is not None for name in kwargs.keys() - _OF_ROWS - _OF_THE_BATCH):
        rows = torch.arange(len(hard), device=hard.device)  # what it is of nobody knows
    kwargs = {name: _in_rows(value, rows) if name in _OF_ROWS else value for name, value in kwargs.items()}
    first, cache = None, output.past_key_values
    if cache is not None:
        if any(cache.is_sliding) or cache.is_compileable:
            raise InputError("hard tokens need a cache that can be cropped: a DynamicCache without sliding windows")
        hidden = run.hidden[-1]
        first = FirstStream(hidden[rows.to(hidden.device)], cache, rows)
        kwargs["past_key_values"] = _without_last(cache, hidden.shape[1])
    others = replace(run, streams=run.adaptive.streams, adaptive=None, first_pass=first, hidden=None)
    again = state.announce(others, forward, *args, **kwargs)
    output.logits[rows] = torch.where(hard[rows][..., None], again.logits, output.logits[rows])
    return output


_OF_ROWS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids"}
_OF_THE_BATCH = {"past_key_values", "use_cache", "logits_to_keep", "return_dict", "cache_position"}


def _in_rows(x: Any, rows: Int[Tensor, " b"]) -> Any:
    """Some rows of inputs (B, …). What has one row is the same for all."""
    if isinstance(x, Mapping):
        return {kind: _in_rows(one, rows) for kind, one in x.items()}
    return x if x is None or len(x) == 1 else x[rows.to(x.device)]


def _without_last(cache: Cache, tokens: int) -> Cache:
    """The same cache without its last tokens. Nothing is copied, and the cache given stays as it is."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    other.crop(-tokens)
    return other


def prediction_entropy(logits: Float[Tensor, "... v"]) -> Float[Tensor, "..."]:
    """Entropy of the predicted distribution, in nats."""
    log_p = logits.float().log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


@torch.no_grad()
def adaptive_losses(
    model: Any, input_ids: Int[Tensor, "b t"], shares: tuple[float, ...] = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
) -> list[AdaptiveLoss]:
    """Loss against the share of hard tokens, on text: what a threshold is worth.

    Args:
        model: a causal LM with shared keys and values, in evaluation mode.
        input_ids: (B, T), without padding.
        shares: of the tokens that shall be hard; the threshold of each is found on this text.

    Raises:
        InputError: the streams have keys and values of their own.
    """
    check_adaptive(model)
    losses, targets, state = [], input_ids[:, 1:], model.base_model.stream_state
    entropies = torch.empty(0)
    for p in (1, state.config.streams):
        with state.using(streams=p, row_mask=None, adaptive=None):
            logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        losses.append(F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none").flatten())
        entropies = prediction_entropy(logits).flatten() if p == 1 else entropies
    order = entropies.argsort(descending=True)
    rows = []
    for share in shares:
        count = round(share * len(order))
        hard = torch.zeros(len(order), dtype=torch.bool, device=order.device)
        hard[order[:count]] = True
        threshold = entropies[order[count]].item() if count < len(order) else 0.0
        rows.append(AdaptiveLoss(threshold, count / len(order), torch.where(hard, losses[1], losses[0]).mean().item()))
    return rows


def check_adaptive(model: Any) -> None:
    """Raise InputError unless the model's streams share keys and values."""
    if model.base_model.stream_state.config.kv != "shared":
        raise InputError("a p for every token needs shared keys and values; train the streams with kv='shared'")
