"""Run by test_compile.py in a process without shape checks: families under `torch.compile(fullgraph=True)`.

usage: python -m tests.contract.compiled BACKEND FAMILY...
"""

import sys
from typing import Any

import torch
from torch import Tensor

from parscale.config import DIVERSIFIERS
from tests.contract.conftest import parallelized
from tests.contract.families import FAMILIES, VOCABULARY
from tests.contract.reference import UPDATES, truth

SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"diversify": DIVERSIFIERS},
    {"diversify": ("prefix", "lora"), "kv": "shared"},
)
ADDED = ("prefix", "stream_embedding", *UPDATES)


def check(name: str, backend: str, settings: dict[str, Any]) -> None:
    """Logits (prefill, then one cached token) and gradients of the compiled model are the uncompiled one's."""
    family = next(f for f in FAMILIES if f.name == name)
    plain = family.build()
    model = parallelized(family.build(), **settings)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with torch.no_grad():
        expected = truth(plain, model, ids)
        expected.close(compiled(ids, use_cache=False).logits)
        prompt = compiled(ids[:, :8], use_cache=True)
        expected.close(compiled(ids[:, 8:], past_key_values=prompt.past_key_values).logits, (slice(None), slice(8, 9)))
    gradients: list[Tensor] = []
    for run in (model, compiled):
        model.zero_grad()
        run(ids, use_cache=False).logits.logsumexp(-1).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for n, p in model.named_parameters() if _added(n)]))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)


def _added(name: str) -> bool:
    return any(part in name for part in ADDED)


if __name__ == "__main__":
    for family_name in sys.argv[2:]:
        for chosen in SETTINGS:
            torch.manual_seed(0)
            torch.compiler.reset()
            check(family_name, sys.argv[1], chosen)
        print(family_name, "equal")
