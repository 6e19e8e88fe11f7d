"""`torch.compile(fullgraph=True)`: no graph break in forward, cached decoding and backward, and the same numbers."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.contract.families import FAMILIES

FEW = ("qwen2", "llama", "gpt2")


@pytest.mark.slow
def test_compiles_without_a_break() -> None:
    _compile("eager", *FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", [f.name for f in FAMILIES])
def test_compiles_to_code(name: str) -> None:
    _compile("inductor", name)


def _compile(backend: str, *names: str) -> None:
    """In a process of its own, for dynamo cannot look through the shape checks of this one."""
    command = [sys.executable, "-m", "tests.contract.compiled", backend, *names]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [word for name in names for word in (name, "equal")]
