"""What the generation tests share."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.small import VOCABULARY, build, with_streams


@pytest.fixture(scope="module")
def model() -> Any:
    """Four streams on a Qwen2; not to be changed."""
    return with_streams(build())


@pytest.fixture
def ids() -> Tensor:
    """Three prompts of nine tokens."""
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
