"""What the checkpoint tests share."""

import pytest
import torch
from torch import Tensor

from tests.small import VOCABULARY


@pytest.fixture
def ids() -> Tensor:
    """Three prompts of nine tokens."""
    return torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(3))
