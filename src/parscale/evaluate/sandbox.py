"""Runs a Python program that nobody has read, in a process that can compute and read files, and nothing else.

The kernel's seccomp lets it no system call through but those that computing takes: no file is opened for writing, no
process started, no socket made, no signal sent. Limits of memory, CPU time and wall-clock time do the rest. What it can
read, it can read: run it as a user who sees no secrets.
"""

import json
import math
import os
import platform
import secrets
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from parscale.errors import InputError
from parscale.evaluate.confined import MACHINES, NO_SANDBOX

WALL = 4
"""Wall-clock seconds for each second of CPU time: other work on the machine must not fail a program."""


@dataclass(frozen=True)
class Outcome:
    """`passed`: the program came to its end. `reason`: why not, in one line."""

    passed: bool
    reason: str = ""


def run_program(program: str, *, seconds: float = 10.0, memory_mib: int = 1024) -> Outcome:
    """Run a program; it passes if no exception leaves it.

    Args:
        program: Python source.
        seconds: of CPU time, rounded up; the wall-clock time is four times that.
        memory_mib: of address space, the interpreter's own included (some 50).

    Raises:
        InputError: this system has no such sandbox. The program was not run then.
    """
    if not available():
        raise InputError(
            f"the sandbox needs Linux on one of {', '.join(MACHINES)}; this is {platform.system()}, "
            f"{platform.machine()}. Nothing was run"
        )
    token = secrets.token_hex(16)  # who ends its process early has not passed, unless it looks for this
    told = {"program": program, "seconds": math.ceil(seconds), "memory": memory_mib << 20, "token": token}
    child = Path(__file__).with_name("confined.py")
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as error:  # the kernel bounds files, not pipes
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(child)],
                input=json.dumps(told).encode(),
                stdout=out,
                stderr=error,
                timeout=WALL * math.ceil(seconds),
                cwd=os.sep,
                env=dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
                start_new_session=True,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(False, f"no end within {WALL * math.ceil(seconds)} s")
        said, complaint = (_text(file) for file in (out, error))
    if done.returncode == NO_SANDBOX:
        raise InputError(f"the kernel gives no sandbox ({complaint}). Nothing was run")
    if said == token:
        return Outcome(True)
    if done.returncode < 0:
        return Outcome(False, f"killed by signal {-done.returncode}, after at most {math.ceil(seconds)} s of CPU time")
    return Outcome(False, (complaint.splitlines() or ["ended before its end"])[-1][:300])


def available() -> bool:
    """Whether this system can have the sandbox."""
    return platform.system() == "Linux" and platform.machine() in MACHINES


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace").strip()
