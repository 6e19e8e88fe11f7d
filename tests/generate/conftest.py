"""What the generation tests share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import VOCABULARY, build, with_streams

KINDS: dict[str, dict[str, Any]] = {"own": {}, "shared": {"kv": "shared", "diversify": ("prefix", "lora")}}


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> Any:
    """Four streams on a Qwen2, with keys and values of their own or shared ones; not to be changed."""
    return with_streams(build(), **KINDS[request.param])


@pytest.fixture
def ids() -> Tensor:
    """Three prompts of nine tokens."""
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
