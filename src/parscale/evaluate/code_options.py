"""How `parscale eval --code` samples and runs programs: all its defaults."""

from dataclasses import dataclass
from pathlib import Path

from parscale.errors import InputError


@dataclass(frozen=True)
class CodeOptions:
    """How code is sampled and run.

    Args:
        execute: run what the model wrote, in a sandbox. Without it nothing is run.
        samples: completions of each problem.
        temperature: of the sampling; 0 is greedy.
        new_tokens: of a completion at most.
        seconds: of CPU time for each program.
        memory_mib: of address space for each program.
        samples_out: write every completion and what came of it to this file, as JSON lines.
    """

    execute: bool = False
    samples: int = 1
    temperature: float = 0.0
    new_tokens: int = 512
    seconds: float = 10.0
    memory_mib: int = 1024
    samples_out: Path | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.temperature < 0:
            raise InputError(f"samples={self.samples}, temperature={self.temperature}: give at least 1, and at least 0")
        if self.samples > 1 and self.temperature == 0:
            raise InputError(f"samples={self.samples} at temperature=0 are all alike; give a temperature such as 0.8")
