"""A static cache under `torch.compile`, in a process of its own: the compiler cannot look through the shape checks."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_decoding(backend: str) -> None:
    command = [sys.executable, "-m", "tests.generate.compiled", backend]
    run = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=900, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("equal\n")
