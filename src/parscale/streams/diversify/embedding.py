"""A learned vector per stream, added to the token embeddings: P·d parameters that tell the streams apart from layer 1.

Not in the paper. It lives at `<backbone>.stream_embedding`, shape (P, d).
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from parscale.streams.order import split


def attach(backbone: nn.Module, streams: int, hidden_size: int, **factory: object) -> None:
    """Give the backbone its vectors, uninitialised."""
    backbone.stream_embedding = nn.Parameter(torch.empty(streams, hidden_size, **factory))


@torch.no_grad()
def init(backbone: nn.Module, scale: float) -> None:
    """Random directions; `scale` 1 makes the vectors as long as a typical token embedding."""
    std = scale * backbone.get_input_embeddings().weight.float().std()
    backbone.stream_embedding.normal_().mul_(std.to(backbone.stream_embedding))


def add(embeddings: Float[Tensor, "pb t d"], vectors: Float[Tensor, "p d"], active: int) -> Float[Tensor, "pb t d"]:
    """Add each active stream's vector to the embeddings of its rows."""
    chosen = vectors[:active, None, None].to(embeddings.dtype)  # (p, 1, 1, d)
    return (split(embeddings, active) + chosen).flatten(0, 1)
