"""Do streams add less memory and latency than the parameters that would do as much? Measured on the machine at hand."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from parscale.cost.model import PAPER_SHAPES, Shape, Workload
from parscale.experiments.claim import Claim
from parscale.experiments.runs import Scale
from parscale.experiments.verdicts import Outcome, Row, Verdict

SMALL, MIDDLE, LARGE = "1.6B", "2.8B", "4.4B"
FRACTION = 0.286
"""Of the way from the middle to the large model lies the dense model of the small one's loss at P = 8, on the paper's
code (parscale.law.claim)."""
STREAMS, BATCHES = (1, 2, 4, 8), (1, 2, 4, 8)


def measurements(scale: Scale) -> Iterator[tuple[str, Any]]:
    """(key, how to get its rows): the small model at every P, the others at P = 1, in bfloat16; batch 1, which decides,
    before the others. Each by itself: models of several P measured together would hold the largest one's tensors at
    every P."""
    for batch in BATCHES[:1] if scale.name == "smoke" else BATCHES:
        for size in (SMALL, MIDDLE, LARGE):
            for p in STREAMS if size == SMALL else (1,):
                key = f"{scale.name} {size} P={p} batch {batch} bf16"
                yield key, lambda size=size, p=p, batch=batch: _measure(scale, size, p, batch)


def _measure(scale: Scale, size: str, streams: int, batch: int) -> list[Row]:
    from parscale.cost.measure import measure_table

    shape = _tiny(PAPER_SHAPES[size]) if scale.name == "smoke" else PAPER_SHAPES[size]
    tokens = 8 if scale.name == "smoke" else 64
    work = Workload(input=tokens, output=tokens, dtype="bf16", accounting="counted")
    rows = measure_table(shape, (streams,), (batch,), work, repeats=3)
    return [{"name": f"{size}, P={row['streams']}, batch {row['batch']}", "size": size} | row for row in rows]


def _tiny(shape: Shape) -> Shape:
    """A sixteenth of the width, two layers: it proves the machinery."""
    return replace(
        shape, hidden=shape.hidden // 16, intermediate=shape.intermediate // 16, head_dim=8, layers=2, vocab=512
    )


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where, at batch 1, both measured ratios are above 1 with the quartiles taken against the claim. A few
    layers of a model decide nothing: its LM head weighs more in them than in the whole."""
    table: list[dict] = []
    curves: dict[str, list[tuple[float, float]]] = {"memory": [], "latency": []}
    by_name = {(row["size"], row["streams"], row["batch"]): row for row in rows}
    worst: dict[str, float | None] = {}
    for batch in sorted({row["batch"] for row in rows}):
        cases = [(SMALL, 1), (SMALL, 8), (MIDDLE, 1), (LARGE, 1)]
        four = [by_name[size, streams, batch] for size, streams in cases if (size, streams, batch) in by_name]
        if len(four) < len(cases):
            continue
        memory = [row["measured"]["peak_gib"] for row in four]
        times = [row["measured"]["request"] for row in four]
        latency = _ratio(*(time["median"] for time in times))
        ratio = _ratio(*memory) if None not in memory else None
        table.append(
            {
                "batch": batch,
                "latency ratio, measured": latency,
                "memory ratio, measured": ratio,
                "latency ratio, derived": _ratio(*(row["latency_s"] for row in four)),
                "memory ratio, derived": _ratio(*(row["memory_gib"] for row in four)),
            }
            | {
                f"{what} at P={p} over P=1": _value(by_name[SMALL, p, batch], what) / _value(four[0], what)
                for what in ("latency", "memory")
                for p in STREAMS[1:]
                if (SMALL, p, batch) in by_name and None not in memory
            }
        )
        curves["latency"].append((float(batch), latency))
        if ratio is not None:
            curves["memory"].append((float(batch), ratio))
        if batch == 1:
            low = _ratio(times[0]["q3"], times[1]["q3"], times[2]["q1"], times[3]["q1"])
            high = _ratio(times[0]["q1"], times[1]["q1"], times[2]["q3"], times[3]["q3"])
            worst = {"low": low, "high": high, "memory": ratio, "latency": latency}
    if not table:
        return Verdict([], "Some of the three sizes is not measured.")
    low, high, ratio = worst["low"], worst["high"], worst["memory"]
    outcome: Outcome = "undecided"
    whole = rows[0]["layers"] == rows[0]["layers_of_model"]
    if whole and ratio is not None and min(ratio, low or 0.0) > 1:
        outcome = "supported"
    elif whole and ((ratio is not None and ratio < 1) or (high is not None and high < 1)):
        outcome = "not supported"
    told = "not told by this system" if ratio is None else f"{ratio:.1f}×"
    layers = f"{rows[0]['layers']} of {rows[0]['layers_of_model']} layers"
    reason = (
        f"At batch 1 the dense model of equal loss adds {told} the memory and {worst['latency']:.1f}× the latency that "
        f"8 streams add (the paper: 22× and 6×), on {rows[0]['machine']['name']}, {layers}."
    )
    if not whole:
        reason += " By the cost model the ratios of a few layers are not those of all."
    return Verdict([outcome], reason, table, curves, ("batch", "added by parameters over added by streams"))


def _value(row: Row, what: str) -> float:
    measured = row["measured"]
    return measured["request"]["median"] if what == "latency" else measured["peak_gib"]


def _ratio(one: float, eight: float, middle: float, large: float) -> float:
    """[C(dense of equal loss) − C(small)] / [C(small, P=8) − C(small)]; infinite where streams add nothing."""
    dense = middle + FRACTION * (large - middle)
    added = eight - one
    return (dense - one) / added if added > 0 else float("inf")


CLAIM = Claim(
    "efficiency",
    "At batch 1, 8 streams add less memory and less latency than the parameters that reach the same loss.",
    "22× less memory and 6× less latency (paper, section 3.3), derived there by a roofline model; with larger batches "
    "less.",
    lambda scale, corpora: [],
    verdict,
    corpora=0,
    measurements=measurements,
)
