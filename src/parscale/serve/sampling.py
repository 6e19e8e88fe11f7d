"""How each request of a packed batch chooses its token: greedy, or drawn with its own temperature, top-p and seed.

transformers samples for a whole batch, with one generator. Here a step always takes the highest score, and the scores
of the requests that sample are put so that the highest one is a fair draw: p / e for e ~ Exp(1) is largest at token i
with probability p_i. A choice's draws depend on the request's seed, on its number in the request and on how many tokens
stand before, and on no other request.
"""

import hashlib
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
    """The way to draw of one choice of a request. `temperature` > 0; 0 <= `top_p` <= 1, where 0 is the likeliest token.
    Of a request that asks for one choice, `choice` is 0."""

    temperature: float
    top_p: float
    seed: int
    choice: int = 0

    def draw(self, scores: Tensor, position: int) -> Tensor:
        """Scores (V,) whose highest is a draw, for the token at `position`, from the softmax of `scores` (V,)."""
        chances = torch.softmax(scores / self.temperature, dim=-1)
        if self.top_p < 1:
            ordered, tokens = chances.sort(descending=True)
            beyond = ordered.cumsum(0) - ordered >= self.top_p  # the token that crosses top_p stays
            beyond[0] = False  # also where top_p is 0 in float32
            chances[tokens[beyond]] = 0.0
        number = seed_of(self.seed, self.choice, position)
        generator = torch.Generator(device=scores.device).manual_seed(number)
        return chances / torch.empty_like(chances).exponential_(generator=generator)


def seed_of(seed: int, choice: int, position: int) -> int:
    """A generator's seed, of the 32 bits that it takes, for one draw; the same in every process and Python.

    A sum of the three would repeat the draws of other seeds, and Python's own hash takes -1 and -2 for the same.
    """
    return int.from_bytes(hashlib.blake2b(f"{seed} {choice} {position}".encode(), digest_size=4).digest(), "little")


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
