"""A learned vector per stream, added to the token embeddings: P·d parameters that tell the streams apart from layer 1.

Not in the paper. It lives at `<backbone>.stream_embedding`, shape (P, d).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import initialization

from parscale.config import StreamsConfig
from parscale.errors import InputError, first_line
from parscale.streams.diversify.calibration import Calibration, evaluating
from parscale.streams.order import split
from parscale.streams.state import StreamState

TOLERANCE = 0.05
"""Mean difference of the logits from the plain model's, in their standard deviations: far above rounding."""


def add(embeddings: Float[Tensor, "pb t d"], vectors: Float[Tensor, "p d"]) -> Float[Tensor, "pb t d"]:
    """Add each stream's vector to the embeddings of its rows."""
    return (split(embeddings, len(vectors)) + vectors[:, None, None].to(embeddings)).flatten(0, 1)


@torch.no_grad()
def check(model: Any, calibration: Calibration, config: StreamsConfig) -> None:
    """Token embeddings have to tell the model all. Some families look token ids up once more, in every layer, and find
    them out from embeddings that have no vector added, if at all.
    """
    embeds = model.get_input_embeddings()(calibration.ids).clone()
    embeds[:, -1] += embeds.std()  # as a stream's vector would; the tokens before do not see it
    try:
        with evaluating(model):
            logits = model(inputs_embeds=embeds, use_cache=False).logits
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = first_line(error)
    else:
        expected = calibration.logits[:, :-1].float()
        if not (logits[:, :-1].float() - expected).abs().mean() > TOLERANCE * expected.std():
            return
        reason = "it then predicts something else"
    raise InputError(
        f"{type(model).__name__} does not run on embeddings with a vector added, so 'embedding' cannot be in "
        f"diversify; use 'prefix' or 'lora' ({reason})"
    )


def attach(model: Any, state: StreamState) -> None:
    """Give the backbone its vectors, uninitialised."""
    tokens = model.get_input_embeddings()
    place = {"device": next(model.base_model.parameters()).device, "dtype": model.dtype}
    model.base_model.stream_embedding = nn.Parameter(torch.empty(state.config.streams, tokens.embedding_dim, **place))


def detach(model: Any) -> None:
    """Take the vectors away."""
    if hasattr(model.base_model, "stream_embedding"):
        del model.base_model.stream_embedding


@torch.no_grad()
def init(model: Any, calibration: Calibration) -> None:
    """Random directions, as long as a typical token embedding; a hundredth of that for a near-identity start."""
    backbone = model.base_model
    scale = 0.01 if backbone.stream_state.config.prefix_init == "near_identity" else 1.0
    std = scale * backbone.get_input_embeddings().weight.float().std()
    backbone.stream_embedding.normal_().mul_(std.to(backbone.stream_embedding))


def reset(module: nn.Module, std: float) -> None:
    """Random directions, as long as a fresh token embedding."""
    if isinstance(vectors := getattr(module, "stream_embedding", None), nn.Parameter):
        initialization.normal_(vectors, std=std)
