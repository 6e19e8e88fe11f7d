"""Continuous batching: the streams of a packed batch become heads of transformers' paged cache.

A paged step is one row of tokens from many requests. P streams make it P rows, and the cache knows one: so it is built
for P × the key/value heads and sees row p's heads as heads p·H … p·H + H − 1; with shared keys and values, for one
stream's heads. The prefix never enters it, and one copy
serves all requests.
"""

import copy
from typing import Any

import transformers
from jaxtyping import Float
from torch import Tensor
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.continuous_api import ContinuousMixin

from parscale.errors import InputError
from parscale.streams.attention import TAG
from parscale.streams.diversify.prefix import shapes_from_config
from parscale.streams.order import fold_into_heads, unfold_from_heads

KEPT = "_cached_continuous_batching_manager"
"""Where transformers keeps a manager that was asked to stay."""


OLDEST = (5, 23)
"""The transformers from which on its paged cache is as this file takes it to be."""


class FoldedCache(PagedAttentionCache):
    """A paged cache of P × H heads that takes and gives P rows of H heads. Only `update` is ever called on it."""

    def __init__(self, inner: PagedAttentionCache, streams: int) -> None:
        self.inner = inner
        self.streams = streams

    def update(
        self,
        key_states: Float[Tensor, "p h t d"],
        value_states: Float[Tensor, "p h t d"],
        layer_idx: int,
        kwargs: dict[str, Any],
    ) -> tuple[Float[Tensor, "p h s d"], Float[Tensor, "p h s d"]]:
        """Write this step's keys and values; return all that the packed requests attend to."""
        key, value = self.inner.update(  # type: ignore[attr-defined]
            fold_into_heads(key_states, self.streams), fold_into_heads(value_states, self.streams), layer_idx, kwargs
        )
        return unfold_from_heads(key, self.streams), unfold_from_heads(value, self.streams)


class FoldedModel(ContinuousMixin):
    """What transformers' batching manager is given in the model's place. It runs the model and shows it as one with P
    times the heads; all else is the model's own.

    Args:
        origin: the user's model, on which a manager is kept if that is asked for.
        model: one of the same weights with a p of its own: managers of one model may differ, each in its thread.

    Raises:
        InputError: layers whose keys and values a paged cache cannot hold, an attention implementation that it cannot
            be used with, or a transformers that is too old.
    """

    _supports_flash_attn = False  # its kernels read the paged cache themselves, without the prefix

    def __init__(self, origin: Any, model: Any) -> None:
        self.__dict__.update(origin=origin, model=model, config=_folded_config(model))

    def __call__(self, *, cache: PagedAttentionCache, **inputs: Any) -> Any:
        return self.model(cache=FoldedCache(cache, self.model.cached_streams), **inputs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.origin if name == KEPT else self.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.origin if name == KEPT else self.model, name, value)

    def eval(self) -> "FoldedModel":
        """Put the model in evaluation mode."""
        self.model.eval()
        return self


def _folded_config(model: Any) -> Any:
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        raise InputError(
            f"continuous batching with streams needs transformers >= {needed}; this is {transformers.__version__}"
        )
    streams, config = model.streams, copy.deepcopy(model.config.get_text_config())
    asked = config._attn_implementation
    if asked.removeprefix(TAG) not in ("sdpa", "eager") or asked == "eager":  # plain eager would ignore a paged cache
        raise InputError(
            f"attn_implementation={asked.removeprefix(TAG)!r} does not go with continuous batching; call "
            "set_attn_implementation('sdpa') before generate_batch"
        )
    shapes = set(shapes_from_config(model).values())
    layers = len(shapes_from_config(model))
    if len(shapes) > 1 or layers < config.num_hidden_layers or any(dk != dv for _, dk, dv in shapes):
        raise InputError(
            f"{type(model).__name__}: a paged cache wants keys and values of one shape in every layer; use generate()"
        )
    ((heads, size, _),) = shapes
    config.head_dim = size
    config.num_key_value_heads = model.cached_streams * heads
    config.num_attention_heads *= streams
    config.hidden_size *= streams  # the manager reckons the memory of a step with it
    config._attn_implementation = "sdpa"  # it then prepares the additive mask that our eager takes as well
    return config
