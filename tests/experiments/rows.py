"""Rows as a sweep writes them, made up: what verdicts and reports are tested on."""

from typing import Any

MACHINE = {"platform": "P", "processor": "C", "threads": 1, "python": "3", "torch": "2", "transformers": "5"}


def row(name: str, seed: int, loss: float, **changes: Any) -> dict[str, Any]:
    """One row of the scale cpu on one text."""
    given = {
        "name": name, "seed": seed, "validation_loss": loss, "scale": "cpu", "corpus": "code", "streams": 1,
        "measured": {}, "tokens": 1000, "seconds": 10.0, "params": 1000, "machine": MACHINE, "skipped_steps": 0,
        "start_loss": loss + 1, "key": f"{name} {seed}", "run": {"block_size": 96},
    }  # fmt: skip
    return given | changes


def seeds(name: str, *losses: float, **changes: Any) -> list[dict[str, Any]]:
    """A row for each loss, with the seeds 0, 1, …"""
    return [row(name, seed, loss, **changes) for seed, loss in enumerate(losses)]
