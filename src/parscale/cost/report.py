"""What `parscale cost` prints: a row for every pair of streams and batch."""

from collections.abc import Sequence
from typing import Any

from parscale.cost.model import Workload, cost_table
from parscale.output import print_json, print_table


def report_costs(
    model: str, streams: Sequence[int], batches: Sequence[int], workload: Workload, hardware: str, as_json: bool
) -> None:
    """Derive and print the table."""
    rows = cost_table(model, streams, batches, workload, hardware)
    if as_json:
        print_json(rows)
        return
    lengths = f"{workload.input} tokens in, {workload.output} out"
    print_table(f"{model} on {hardware}, {workload.dtype}, {lengths}: GiB and seconds", [_flat(row) for row in rows])


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The parts beside the totals; decode of all tokens is their number times decode_step."""
    memory, latency = row["memory"], row["latency"]
    totals = {name: row[name] for name in ("params", "streams", "batch", "memory_gib")}
    return (
        totals | memory | {name: latency[name] for name in ("prefill", "decode_step")} | {"latency_s": row["latency_s"]}
    )
