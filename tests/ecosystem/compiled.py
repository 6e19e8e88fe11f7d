"""Run by test_threads.py in a process without shape checks: one compiled model in several threads.

usage: python -m tests.ecosystem.compiled BACKEND
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import CompileConfig

from tests.generate.conftest import KINDS
from tests.small import build, greedy, with_streams


@torch.no_grad()
def forward_in_threads(model: Any, ids: Tensor, backend: str) -> None:
    """Each thread at its own p, in a graph that its p has been guarded with."""
    torch.compiler.reset()
    state, compiled = model.base_model.stream_state, torch.compile(model, fullgraph=True, backend=backend)

    def logits(streams: int) -> Tensor:
        with state.using(streams=streams):
            return compiled(ids, use_cache=False).logits

    asked = (4, 2, 1, 3) * 3
    expected = {p: model.with_streams(p)(ids, use_cache=False).logits for p in set(asked)}
    with ThreadPoolExecutor(4) as pool:
        for p, found in zip(asked, pool.map(logits, asked), strict=True):
            torch.testing.assert_close(found, expected[p], rtol=1e-4, atol=1e-4)


def generate_in_threads(model: Any, ids: Tensor, backend: str) -> None:
    """`generate` compiles the decoding step of a static cache."""
    torch.compiler.reset()
    settings: Any = CompileConfig(fullgraph=True, backend=backend)
    settings._compile_all_devices = True
    asked = (4, 2) * 3
    expected = {p: greedy(model, ids, streams=p) for p in set(asked)}
    model.generation_config.compile_config = settings
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda p: greedy(model, ids, cache_implementation="static", streams=p), asked)
    for p, tokens in zip(asked, found, strict=True):
        assert torch.equal(tokens, expected[p]), p


if __name__ == "__main__":
    prompts = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    for kind in KINDS.values():
        forward_in_threads(with_streams(build(), **kind), prompts, sys.argv[1])
        generate_in_threads(with_streams(build(), **kind), prompts, sys.argv[1])
    print("equal")
