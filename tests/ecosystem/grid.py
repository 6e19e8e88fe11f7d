"""Families × diversifiers × whose keys and values: the cases of suites that try ordinary use on all of them."""

from typing import Any

import pytest

from tests.contract.families import FAMILIES

DIVERSIFIERS: dict[str, dict[str, Any]] = {
    "prefix": {},
    "lora": {"diversify": ("lora",)},
    "rank1+embedding": {"diversify": ("prefix", "rank1", "embedding")},
}


def cases(fast: set[tuple[str, str]]) -> list[Any]:
    """(family, diversifiers, kv), all slow except the pairs of family and diversifiers in `fast`."""
    return [
        pytest.param(family.name, kind, kv, marks=[] if (family.name, kind) in fast else [pytest.mark.slow])
        for family in FAMILIES
        for kind in DIVERSIFIERS
        for kv in ("own", "shared")
        if not (family.recurrent and kv == "shared")
    ]
