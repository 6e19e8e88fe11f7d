"""Every family equals P separate passes with the prefix concatenated by hand, in float64."""

import torch
from torch import Tensor

from tests.contract.conftest import Case
from tests.contract.reference import truth


@torch.no_grad()
def test_equals_separate_passes(case: Case, ids: Tensor) -> None:
    expected = truth(case.plain, case.model, ids)
    logits = case.model(ids).logits
    torch.testing.assert_close(logits.double(), expected.logits, rtol=0, atol=expected.tolerance)
