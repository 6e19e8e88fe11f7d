"""Run by test_compiled.py in a process without shape checks: a static cache and compiled decoding.

usage: python -m tests.generate.compiled BACKEND
"""

import sys
from typing import Any

import torch
from transformers import CompileConfig, StaticCache

from tests.generate.conftest import KINDS
from tests.small import build, greedy, uncached, with_streams


def generate_compiles_by_itself(model: Any, ids: torch.Tensor, backend: str) -> None:
    """`generate` compiles the decoding step when a static cache is asked for; on a CPU only when told to."""
    settings = CompileConfig(fullgraph=True, backend=backend)
    settings._compile_all_devices = True
    model.generation_config.compile_config = settings
    for streams in (4, 2):
        torch.compiler.reset()
        made = greedy(model, ids, cache_implementation="static", streams=streams)
        assert torch.equal(made, uncached(model.with_streams(streams), ids)), streams
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


@torch.no_grad()
def a_callers_own_loop(model: Any, ids: torch.Tensor, backend: str) -> None:
    """One graph for all steps: nothing in it depends on how many tokens there are."""
    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=32)
    made = torch.cat([ids, model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)], dim=1)
    step = torch.compile(model, fullgraph=True, backend=backend)
    torch._dynamo.utils.counters.clear()
    for _ in range(7):
        place = torch.tensor([[made.shape[1] - 1]])
        logits = step(made[:, -1:], past_key_values=cache, position_ids=place).logits
        made = torch.cat([made, logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, uncached(model, ids))
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs <= 2, f"{graphs} graphs for 7 steps"


if __name__ == "__main__":
    prompts = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(3))
    for kind in KINDS.values():
        a_callers_own_loop(with_streams(build(), **kind), prompts, sys.argv[1])
        generate_compiles_by_itself(with_streams(build(), **kind), prompts, sys.argv[1])
    print("equal")
