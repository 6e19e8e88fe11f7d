"""`parscale report`: every claim with its verdict, tables and plots, as one HTML page that needs no network.

What could not be run stands in it as "not run", with the GPU hours that it needs; nothing is guessed.
"""

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parscale.errors import InputError
from parscale.experiments.catalogue import CLAIMS
from parscale.experiments.claim import Claim
from parscale.experiments.experiment import outcome_told, planned, verdict_of
from parscale.experiments.report import page, svg, table
from parscale.experiments.shapes import H100_FLOPS, UTILISATION
from parscale.experiments.sweep import read_rows
from parscale.experiments.verdicts import Verdict
from parscale.utils.files import write_text

RUNNABLE = ("gpu", "cpu", "smoke")
"""Scales whose rows can be there; a claim's verdict is that of the first that has rows."""
INTRODUCTION = (
    "Losses are nats per token on held-out text. A gain is the control's loss minus a run's, of the same seed, text "
    "and tokens; the control is one stream with a prefix. Beside it: its 95 % interval (Student's t) over seeds, and "
    "its size in standard deviations of the control over seeds (sd). A part is supported where the interval of three "
    "or more seeds is above 0, not supported where it is nowhere above 0.02 nats, else undecided; a claim is what all "
    "its parts are; where they differ it is undecided, and how many say what stands beside. Where a section has "
    "another control or rule, the names of its runs and its reason say so: law and theory are judged by fits and "
    "ranks, sharing and split by the share of a gain that is kept, smoothing and prefix by weights and attention too, "
    "efficiency by ratios. Means in a table are over the seeds of each run. The scale smoke proves the machinery "
    "alone: its runs are a few steps long and decide nothing. What the paper's own sizes would take is told in hours "
    "of one H100 (h)."
)
CURVES = 8
"""As many as a plot holds the names of."""


def write_report(results: Path, out: Path | None = None) -> Path:
    """Write the page to `out`, by default `results/report.html`. Returns where it stands.

    Raises:
        InputError: the folder has no rows of any experiment.
    """
    rows = {name: read_rows(results / f"{name}.jsonl") for name in CLAIMS}
    if not any(rows.values()):
        raise InputError(f"results={results}: no rows of an experiment are in it; run parscale experiment first")
    out = out or results / "report.html"
    verdicts = {name: _verdicts(claim, rows[name]) for name, claim in CLAIMS.items()}
    summary = [_summary(claim, verdicts[name], rows[name]) for name, claim in CLAIMS.items()]
    parts = [
        "<h1>What the experiments say of parallel streams</h1>",
        f"<p>{html.escape(INTRODUCTION)}</p>",
        table("Claims", ("experiment", "verdict", "scale", "rows", "the claim", "the paper's scale"), summary),
        *(_section(claim, verdicts[name], rows[name]) for name, claim in CLAIMS.items()),
    ]
    return write_text(out, page("Experiments on parallel streams", "\n".join(parts)))


def _verdicts(claim: Claim, rows: Sequence[dict[str, Any]]) -> dict[str, Verdict]:
    """By scale, for those that have rows."""
    return {scale: verdict_of(claim, rows, scale) for scale in RUNNABLE if any(row["scale"] == scale for row in rows)}


def _summary(claim: Claim, verdicts: dict[str, Verdict], rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    scale = next(iter(verdicts), "")
    outcome = outcome_told(verdicts[scale], scale) if scale else "not run"
    count = sum(row["scale"] == scale for row in rows)
    hours = sum(row["H100 hours"] for row in planned(claim))
    paper = f"not run, {hours:,} h" if hours else ""
    return f"#{claim.name}", outcome, scale, str(count), claim.sentence, paper


def _section(claim: Claim, verdicts: dict[str, Verdict], rows: Sequence[dict[str, Any]]) -> str:
    parts = [
        f'<h2 id="{html.escape(claim.name)}">{html.escape(claim.name)}</h2>',
        f"<p><strong>{html.escape(claim.sentence)}</strong></p>",
        f"<p>Expected: {html.escape(claim.expected)}</p>",
    ]
    if not verdicts:
        parts.append("<p>Not run.</p>")
    for scale, verdict in verdicts.items():
        parts.append(f"<h3>{scale}: {outcome_told(verdict, scale)}</h3>{_reason(verdict.reason)}")
        if verdict.table:
            columns = tuple(verdict.table[0])
            cells = [tuple(_cell(row.get(name)) for name in columns) for row in verdict.table]
            parts.append(table(f"{claim.name}, {scale}", columns, cells))
        if any(len(points) > 1 for points in verdict.curves.values()):
            parts.append(svg(_draw, verdict))
        parts.append(f'<p class="note">{html.escape(_machines(rows, scale))}</p>')
    if plan := planned(claim):
        hours = f"{sum(row['H100 hours'] for row in plan):,}"
        caption = f"Hours of one H100: 6·N·P·D operations at {UTILISATION:.0%} of {H100_FLOPS / 1e12:.0f} TFLOP/s"
        cells = [(*(str(value) for value in row.values()), "not run") for row in plan]
        parts.append(
            f"<details><summary>At the paper's scale: not run; {hours} hours of one H100</summary>"
            f"{table(caption, (*plan[0], 'loss'), cells)}</details>"
        )
    return "\n".join(parts)


def _reason(told: str) -> str:
    """A paragraph; a list where it is a value for each of many parts."""
    parts, lead = told.removesuffix(".").split("; "), ""
    if len(parts) < 4:
        return f"<p>{html.escape(told)}</p>"
    if parts[0].count(": ") > parts[1].count(": "):  # what all are values of stands in front of the first
        lead, _, parts[0] = parts[0].partition(": ")
    items = "".join(f"<li>{html.escape(part)}</li>" for part in parts)
    return (f"<p>{html.escape(lead)}:</p>" if lead else "") + f"<ul>{items}</ul>"


def _machines(rows: Sequence[dict[str, Any]], scale: str) -> str:
    """On what, and how long."""
    of = [row for row in rows if row["scale"] == scale]
    machines = dict.fromkeys(_machine(row["machine"]) for row in of if "machine" in row)
    seconds = sum(row.get("seconds", 0.0) for row in of)
    spent = f" {_span(seconds)} of training." if seconds else ""
    return f"{len(of)} rows on {'; '.join(machines)}.{spent}"


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _machine(told: dict[str, Any]) -> str:
    if "name" in told:
        return told["name"]
    name = told["processor"] or told["platform"]
    return f"{name}, {told['threads']} threads, torch {told['torch']}, transformers {told['transformers']}"


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _draw(figure: Any, verdict: Verdict) -> None:
    plot = figure.subplots()
    places = sorted({x for points in verdict.curves.values() for x, _ in points})
    for label, points in verdict.curves.items():
        x, y = zip(*sorted(points), strict=True)
        plot.plot(x, y, marker="o", markersize=4, linestyle="" if verdict.cloud else "-", label=label)
    if all(x.is_integer() for x in places):
        if places[0] > 0:
            plot.set_xscale("log", base=2)
        plot.set_xticks(places, [f"{x:.0f}" for x in places])
        plot.minorticks_off()
    if plot.get_ylim()[0] < 0 < plot.get_ylim()[1]:
        plot.axhline(0, color="black", linewidth=0.8)
    plot.set(xlabel=verdict.axes[0], ylabel=verdict.axes[1])
    plot.grid(alpha=0.3)
    if len(verdict.curves) <= CURVES:
        plot.legend(frameon=False)
    else:  # inside they would cover the curves
        figure.set_size_inches(10, max(4, 0.22 * len(verdict.curves)))
        plot.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
