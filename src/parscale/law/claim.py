"""Where the paper's "22x less memory increase and 6x less latency increase" comes from, worked out from its losses.

The claim compares two ways to the same loss from a 1.6 B model: 8 streams, or more parameters. Its ratio is what the
parameters add over what the streams add, of memory and of latency.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from parscale.cost.hardware import HARDWARE
from parscale.cost.model import ACCOUNTING, PAPER_SHAPES, Workload, cost
from parscale.law.equivalence import equivalent_params
from parscale.law.fit import fit
from parscale.law.runs import paper
from parscale.output import print_json, print_table

LENGTHS = (64, 128, 256, 512)
BASE, STREAMS, HARDWARE_NAME = "1.6B", 8, "a100-80g"

ASSUMPTIONS = (
    "the base model is the paper's 1.6 B with P = 1; the streamed one the same with P = 8",
    "the dense rival is the model with the measured Stack-V2-Python loss of (1.6 B, P = 8), 1.0383 nats; its costs lie "
    "on the straight line, in loss, between those of the measured 2.8 B and 4.4 B models (fraction 0.286)",
    "ratio = [cost(rival) - cost(1.6 B, P = 1)] / [cost(1.6 B, P = 8) - cost(1.6 B, P = 1)]: increases, not totals",
    "costs are derived, not measured: the released analysis' roofline on an A100-80G, 16-bit, flops efficiency 0.7, "
    "bandwidth efficiency 0.9",
    "batch 1; costs are the mean over 64, 128, 256, 512 tokens in and as many out",
)


@dataclass(frozen=True)
class Ratios:
    """`memory` and `latency`: how many times as much the dense rival adds. `rival_params`: its N."""

    memory: float
    latency: float
    rival_params: float


def claim_ratios(
    corpus: str = "stack",
    rival: str = "measured",
    lengths: tuple[int, ...] = LENGTHS,
    workload: Workload | None = None,
    base: str = BASE,
    streams: int = STREAMS,
) -> Ratios:
    """The two ratios. `rival`: "measured", the dense model of the measured loss, or "fitted", N' of the fitted law."""
    work = workload or Workload()
    dense = [_mean_cost(name, replace(work, streams=1), lengths) for name in PAPER_SHAPES]  # (sizes, 2)
    plain = _mean_cost(base, replace(work, streams=1), lengths)
    streamed = _mean_cost(base, replace(work, streams=streams), lengths)
    params = np.array([shape.params() for shape in PAPER_SHAPES.values()])
    rows = paper(corpus)
    loss = {(row["params"], row["streams"]): row["loss"] for row in rows}
    n_streamed = PAPER_SHAPES[base].params(streams)
    if rival == "measured":
        losses = np.array([loss[n, 1] for n in params])
        at, points = -loss[n_streamed, streams], -losses  # ascending, as np.interp wants them
    else:
        at, points = equivalent_params(fit(rows), n_streamed, streams), params.astype(float)
    equal = np.array([np.interp(at, points, [row[i] for row in dense]) for i in range(2)])
    memory, latency = (equal - plain) / (streamed - plain)
    return Ratios(float(memory), float(latency), float(np.interp(at, points, params)))


def claim() -> dict[str, Any]:
    """`memory_ratio` and `latency_ratio` of the headline, `assumptions`, the `costs` that it compares, `variants` (rows
    of what else the same data give when one assumption changes) and `sentence`, when the claim holds and when not."""
    headline = claim_ratios()
    variants = [_row(name, ratios) for name, ratios in _variants()]
    return {
        "memory_ratio": headline.memory,
        "latency_ratio": headline.latency,
        "rival_params": headline.rival_params,
        "assumptions": list(ASSUMPTIONS),
        "costs": [_cost_row(name, p) for name, p in ((BASE, 1), (BASE, STREAMS), ("2.8B", 1), ("4.4B", 1))],
        "variants": variants,
        "sentence": _sentence(headline),
    }


def report_claim(as_json: bool, plot: Path | None) -> None:
    """Print the claim, and draw it to `plot` if there is one."""
    result = claim()
    if plot is not None:
        result["plot"] = str(draw_claim(plot))
    if as_json:
        print_json(result)
        return
    print(f"memory {result['memory_ratio']:.1f}x, latency {result['latency_ratio']:.1f}x", end="; ")
    print(f"the dense rival has {result['rival_params'] / 1e9:.2f} B parameters")
    print("\nassumptions")
    for line in result["assumptions"]:
        print(f"  - {line}")
    print()
    print_table("what is compared", result["costs"])
    print_table("the same with one assumption changed", result["variants"])
    print(result["sentence"])


def _cost_row(name: str, streams: int) -> dict[str, Any]:
    memory, latency = _mean_cost(name, Workload(streams=streams), LENGTHS)
    return {"model": name, "P": streams, "memory, GiB": float(memory), "latency, s": float(latency)}


def draw_claim(path: str | Path) -> Path:
    """The figure: memory and latency increase of streams and of parameters, and the ratios against the batch."""
    from matplotlib.figure import Figure

    from parscale.law.plot import save_figure

    figure = Figure(figsize=(11, 4), dpi=110, layout="constrained")
    points, ratios = figure.subplots(1, 2)
    for name, shape in PAPER_SHAPES.items():
        loss = {(r["params"], r["streams"]): r["loss"] for r in paper("stack")}
        trail = [(_mean_cost(name, Workload(streams=p), LENGTHS)[0], loss[shape.params(p), p]) for p in (1, 2, 4, 8)]
        points.plot(*zip(*trail), "o-", markersize=4, label=f"{name}, P = 1, 2, 4, 8")
    points.set(xlabel="memory, GiB", ylabel="loss, nats a token (Stack)", title="Streams go down, parameters go right")
    points.legend(frameon=False, fontsize=8)
    batches = (1, 2, 4, 8, 16)
    for accounting, style in zip(ACCOUNTING, ("o-", "s--")):
        rows = [claim_ratios(workload=Workload(batch=b, accounting=accounting)) for b in batches]
        ratios.plot(batches, [r.memory for r in rows], style, color="C0", label=f"memory, {accounting}")
        ratios.plot(batches, [r.latency for r in rows], style, color="C1", label=f"latency, {accounting}")
    ratios.axhline(1, color="0.6", linewidth=0.8)
    ratios.set(xscale="log", yscale="log", xlabel="batch", ylabel="ratio of the increases", title="The claim, by batch")
    ratios.set_xticks(batches, [str(b) for b in batches])
    ratios.set_yticks((0.5, 1, 2, 5, 10, 20), ("0.5", "1", "2", "5", "10", "20"))
    ratios.minorticks_off()
    ratios.legend(frameon=False)
    return save_figure(figure, path)


def _mean_cost(name: str, workload: Workload, lengths: tuple[int, ...]) -> np.ndarray:
    """(memory in GiB, latency in s), the mean over `lengths` tokens in and as many out."""
    rows = [cost(PAPER_SHAPES[name], replace(workload, input=n, output=n), HARDWARE[HARDWARE_NAME]) for n in lengths]
    return np.array([[row["memory_gib"], row["latency_s"]] for row in rows]).mean(axis=0)


def _variants() -> list[tuple[str, Ratios]]:
    return [
        ("headline", claim_ratios()),
        ("rival by the fitted law, N' = N·(k·ln P + 1)", claim_ratios(rival="fitted")),
        ("64 tokens in and out only", claim_ratios(lengths=(64,))),
        ("Pile losses", claim_ratios("pile")),
        *((f"batch {b}", claim_ratios(workload=Workload(batch=b))) for b in (2, 4, 8)),
        ("P = 4 instead of 8", claim_ratios(streams=4)),
        ("P = 2 instead of 8", claim_ratios(streams=2)),
        ("this library's forward counted, batch 1", claim_ratios(workload=Workload(accounting="counted"))),
        ("this library's forward counted, batch 8", claim_ratios(workload=Workload(accounting="counted", batch=8))),
    ]


def _row(name: str, ratios: Ratios) -> dict[str, Any]:
    return {
        "variant": name,
        "memory_ratio": ratios.memory,
        "latency_ratio": ratios.latency,
        "rival_params": ratios.rival_params,
    }


def _sentence(headline: Ratios) -> str:
    at_8 = claim_ratios(workload=Workload(batch=8))
    return (
        f"The claim ({headline.memory:.1f}x memory, {headline.latency:.1f}x latency) holds for one request at a time, "
        "where decoding waits for memory and the streams' arithmetic is free; it does not hold for batches: at batch 8 "
        f"the same rule gives {at_8.memory:.1f}x and {at_8.latency:.2f}x, so streams then add "
        f"{'more' if at_8.latency < 1 else 'less'} latency than parameters do."
    )
