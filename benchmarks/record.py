"""How every benchmark times and what stands in every result file: hardware, versions, commit, command, numbers."""

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from parscale.utils.files import write_text

RESULTS = Path(__file__).parent / "results"


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, list[float]]:
    """Seconds of every case, one after the other in each round, so that a drifting machine is fair to all.

    A case that runs in another process returns its seconds as a float; the others are timed here.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(warmup + rounds):
        for name, run in cases.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            start = time.perf_counter()
            told = run()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i >= warmup:
                times[name].append(told if isinstance(told, float) else time.perf_counter() - start)
    return times


def summary(seconds: list[float], reference: list[float]) -> dict[str, float]:
    """Median in milliseconds, quartiles, and the median over rounds of the ratio to the reference case."""
    ratio = statistics.median(a / b for a, b in zip(seconds, reference, strict=True))
    return spread(seconds) | {"ratio": round(ratio, 3)}


def spread(seconds: list[float]) -> dict[str, float]:
    """Median in milliseconds, and quartiles."""
    quartiles = statistics.quantiles(seconds, n=4)
    return {
        "ms": round(1e3 * statistics.median(seconds), 3),
        "ms_q1": round(1e3 * quartiles[0], 3),
        "ms_q3": round(1e3 * quartiles[2], 3),
    }


def resumed(
    wanted: Iterable[tuple[dict[str, Any], Callable[[], dict[str, Any]]]], file: Path, minutes: float
) -> list[dict[str, Any] | None]:
    """Each wanted row, as the file holds it, or measured and added to it; None where it was to begin after so many
    minutes. What tells a row from the others comes with the function that measures the rest of it."""
    ends = time.monotonic() + 60 * minutes
    held = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for about, measure in wanted:
        row = next((row for row in held if about.items() <= row.items()), None)
        if row is None and time.monotonic() < ends:
            row = about | measure()
            with file.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")
            print(row, file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def write(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write `results/{name}.json`, under a temporary name first."""
    record = {
        "command": " ".join(["python", *sys.argv]),
        "commit": _git("rev-parse", "--short", "HEAD") + ("+changes" if _git("status", "--porcelain", "src") else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": {
            "processor": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_average_at_end": os.getloadavg(),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "settings": settings,
        "rows": rows,
    }
    return write_text(RESULTS / f"{name}.json", json.dumps(record, indent=1) + "\n")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
