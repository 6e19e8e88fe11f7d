"""The merger: the weighted sum of the streams' final hidden states, which goes to the LM head (paper, equation 3)."""

from jaxtyping import Float
from torch import Tensor


def merge(hidden: Float[Tensor, "p b t d"], weights: Float[Tensor, "p b t"]) -> Float[Tensor, "b t d"]:
    """Σ_p w_p·h_p, summed in the weights' dtype (float32) and returned in the hidden states' dtype."""
    return (hidden * weights[..., None]).sum(0).to(hidden.dtype)
