"""How each request of a packed batch chooses its token: greedy, or drawn with its own temperature, top-p and seed.

transformers samples for a whole batch, with one generator. Here a step always takes the highest score, and the scores
of the requests that sample are put so that the highest one is a fair draw: p / e for e ~ Exp(1) is largest at token i
with probability p_i. A request's draws depend on its seed and on how many tokens stand before, and on no other request.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessor,
    ContinuousBatchingLogitsProcessorList,
)


@dataclass(frozen=True)
class Sampling:
    """One request's way to draw. `temperature` > 0; 0 < `top_p` <= 1."""

    temperature: float
    top_p: float
    seed: int

    def draw(self, scores: Tensor, position: int) -> Tensor:
        """Scores (V,) whose highest is a draw, for the token at `position`, from the softmax of `scores` (V,)."""
        chances = torch.softmax(scores / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, tokens = chances.sort(descending=True)
            beyond = ordered.cumsum(0) - ordered >= self.top_p  # the token that crosses top_p stays
            chances[tokens[beyond]] = 0.0
        # A generator takes 32 bits of its seed; a tuple's hash mixes both numbers and is the same in any process.
        generator = torch.Generator(device=scores.device).manual_seed(hash((self.seed, position)) & 0xFFFFFFFF)
        return chances / torch.empty_like(chances).exponential_(generator=generator)


class Sampler(ContinuousBatchingLogitsProcessor):
    """Gives the rows of requests that were added with `sampling=Sampling(...)` their draw; the others stay greedy."""

    supported_kwargs = {"sampling": Sampling}  # noqa: RUF012
    ignored_kwargs = ()

    def __init__(self) -> None:
        self.rows: list[tuple[Sampling | None, int]] = []

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """Nothing: a request without `sampling` is greedy."""

    def prepare_tensor_args(self, requests_with_new_token: list[Any]) -> Tensor:
        """Remember each row's sampling and position: this thread runs the step next, no tensor has to carry them."""
        states = [request.state for request in requests_with_new_token]
        self.rows = [
            (state.logit_processor_kwargs.get("sampling"), len(state.initial_tokens) + len(state.generated_tokens))
            for state in states
        ]
        return torch.empty(0, dtype=torch.int32)

    def __call__(self, scores: Tensor, tensor_arg: Tensor) -> Tensor:
        """Scores (rows, V) in the order of the requests."""
        for row, (sampling, position) in enumerate(self.rows):
            if sampling is not None:
                scores[row] = sampling.draw(scores[row], position)
        return scores


def use_sampler(manager: Any) -> None:
    """Let a batching manager that has not started, and is greedy, take `sampling` with each request."""
    processors = ContinuousBatchingLogitsProcessorList(LogitsProcessorList([Sampler()]))
    processors.tensors_required = 1
    manager.logit_processor = processors
