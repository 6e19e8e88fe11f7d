"""The aggregation head: how much each stream counts, token by token (paper, section 2.2 and equation 4).

Knows the released tensor names `aggregate_layer.0|2` and the input order: hidden-major, stream-minor, `b s (h p)`.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization

from parscale.config import HeadInit


class AggregationHead(nn.Sequential):
    """MLP over the P final hidden states of a token: Linear(P·d → d), SiLU, Linear(d → P).

    The last layer starts at zero, so every stream starts with weight 1/P and gets its share of the gradient; unless
    `start` is "random".
    """

    def __init__(self, streams: int, hidden_size: int, start: HeadInit = "zero", **factory: Any) -> None:
        super().__init__(
            nn.Linear(streams * hidden_size, hidden_size, **factory),
            nn.SiLU(),
            nn.Linear(hidden_size, streams, **factory),
        )
        self.streams = streams
        self.start: HeadInit = start
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """A random first layer (std 1/√fan_in, bias 0), and a last one of zeros or as random. What a checkpoint has
        given stays."""
        first, _, last = self._layers()
        initialization.normal_(first.weight, std=first.in_features**-0.5)
        initialization.zeros_(first.bias)
        if self.start == "zero":
            initialization.zeros_(last.weight)
        else:
            initialization.normal_(last.weight, std=last.in_features**-0.5)
        initialization.zeros_(last.bias)

    def forward(self, hidden: Float[Tensor, "p b t d"]) -> Float[Tensor, "b t p"]:
        """Logits of the streams' weights. With p < P streams the absent ones read as zero in the first layer."""
        active = hidden.shape[0]
        first, _, _ = self._layers()
        x = hidden.permute(1, 2, 3, 0).to(first.weight.dtype)  # (B, T, d, p)
        if active < self.streams:  # padded, not cut: a layer called as a module has with it what peft puts on it
            x = F.pad(x, (0, self.streams - active))
        return super().forward(x.flatten(2))[..., :active]

    def _layers(self) -> Any:
        return tuple(self)


def stream_weights(
    hidden: Float[Tensor, "p b t d"],
    head: AggregationHead | None,
    smoothing: float,
    present: Bool[Tensor, "p b"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, "p b t"]:
    """w = softmax(head(h)) in float32 at least, then w ← (1 − ε)·w + ε/P (equation 4). Without a head: 1/P each.

    Args:
        hidden: final hidden states of the active streams, after the final norm.
        head: the aggregation head, or None for the mean.
        smoothing: ε. It keeps every stream's gradient alive.
        present: which of the streams count in which row, at least one; all by default. The others get weight 0, as if
            the row had been run without them.
        temperature: what the head's logits are divided by.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if present is None:
        present = torch.ones(hidden.shape[0], 1, dtype=torch.bool, device=hidden.device)
        masked = hidden
    else:
        masked = hidden * present[..., None, None]
    shares = present[..., None].to(dtype) / present.sum(0)[:, None]  # 1/p for the streams that count: (P, B or 1, 1)
    if head is None:
        return shares.expand(hidden.shape[:3])
    logits = head(masked).to(hidden.device)  # a device_map may have put the head elsewhere
    logits = logits if temperature == 1 else logits / temperature
    logits = logits.masked_fill(~present.T[:, None], -torch.inf)  # (B, T, P)
    weights = logits.softmax(-1, dtype=dtype).permute(2, 0, 1)
    return weights * (1 - smoothing) + smoothing * shares
