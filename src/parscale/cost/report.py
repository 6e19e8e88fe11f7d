"""What `parscale cost` prints: a row for every pair of streams and batch, derived or measured beside derived."""

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


def report_measured(
    model: str,
    streams: Sequence[int],
    batches: Sequence[int],
    workload: Workload,
    hardware: str | None,
    as_json: bool,
    repeats: int,
    layers: int | None,
) -> None:
    """Measure and print the table."""
    from parscale.cost.measure import measure_table

    rows = measure_table(model, streams, batches, workload, hardware, repeats, layers)
    if as_json:
        print_json(rows)
        return
    first = rows[0]
    machine, depth = first["machine"], f"{first['layers']} of {first['layers_of_model']} layers"
    print(f"{machine['name']}: {machine['bandwidth'] / 1e9:.1f} GB/s by a matrix-vector product, ", end="")
    print(f"{machine['flops'] / 1e12:.3g} TFLOP/s by a matrix product in {workload.dtype}")
    print(f"measured and derived ({'this machine' if hardware is None else hardware}) are both of {depth}")
    lengths = f"{workload.input} tokens in, {workload.output} out"
    title = f"{model}, {workload.dtype}, {workload.kv} keys and values, {lengths}: medians of {repeats}, ms"
    print_table(title, [_flat_measured(row) for row in rows])


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The parts beside the totals; decode of all tokens is their number times decode_step."""
    memory, latency = row["memory"], row["latency"]
    totals = {name: row[name] for name in ("params", "streams", "batch", "memory_gib")}
    return (
        totals | memory | {name: latency[name] for name in ("prefill", "decode_step")} | {"latency_s": row["latency_s"]}
    )


def _flat_measured(row: dict[str, Any]) -> dict[str, Any]:
    """GiB, then for prefill and decode step the median, its quartiles, what is derived, and the floor, in ms."""
    flat = {name: row[name] for name in ("params", "streams", "batch", "memory_gib")}
    flat["peak_gib"] = row["measured"]["peak_gib"]
    for part, name in (("prefill", "prefill"), ("decode_step", "step")):
        seen = {key: 1e3 * value for key, value in row["measured"][part].items()}
        flat[name] = seen["median"]
        flat[f"{name} quartiles"] = f"{seen['q1']:.4g} to {seen['q3']:.4g}"
        flat[f"{name} derived"] = 1e3 * row["latency"][part]
        flat[f"{name} floor"] = 1e3 * row["floor"][part]
    return flat
