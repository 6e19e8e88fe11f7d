"""What `parscale law` prints: the fit with its doubts, predictions and equivalences, as text or JSON."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parscale.law.compare import compare
from parscale.law.equivalence import equivalence_exponent, equivalent_params
from parscale.law.fit import Law, bootstrap, law_of, leave_one_out
from parscale.law.runs import CORPORA
from parscale.output import print_json, print_table


def report_fit(
    source: str, form: str, samples: int, seed: int, rivals: bool, plot: Path | None, as_json: bool
) -> dict[str, Any]:
    """Fit, judge, draw to `plot` if there is one, and print. Returns what was printed as JSON would be."""
    law = law_of(source, form)
    report = judge(law, samples, seed, rivals) | {"source": source}
    if plot is not None:
        from parscale.law.plot import draw_law

        report["plot"] = str(draw_law(law, plot, title=source if source in CORPORA else Path(source).stem))
    if as_json:
        print_json(report)
    else:
        _print_fit(report)
    return report


def judge(law: Law, samples: int, seed: int, rivals: bool) -> dict[str, Any]:
    """All that is known of a fit: coefficients with 95 % intervals from `samples` refits, objective, R², residuals, the
    fits without one size, and with `rivals` every form on the same runs and the verdict."""
    report: dict[str, Any] = {
        "form": law.form.name,
        "formula": law.form.formula,
        "coefficients": law.coefficients,
        "intervals_95": bootstrap(law, samples, seed),
        "objective": law.objective,
        "r2": law.r2,
        "runs": len(law.runs),
        "residuals": _residual_rows(law),
        "leave_one_size_out": _left_out_rows(law),
    }
    if rivals:
        comparison = compare(law.runs)
        report["rivals"] = [_rival_row(rival) for rival in comparison.rivals]
        report["verdict"] = comparison.verdict
    return report


def print_predictions(
    source: str,
    params: Sequence[float],
    streams: Sequence[int],
    tokens: float | None,
    as_json: bool,
    columns: Sequence[str],
) -> None:
    """Print `columns` of `predictions`."""
    law = law_of(source, "paper" if tokens is None else "data")
    rows = [{name: row[name] for name in columns} for row in predictions(law, params, streams, tokens)]
    if as_json:
        print_json(rows)
    else:
        print_table(f"{law.form.formula}, {source}", rows)


def predictions(law: Law, params: Sequence[float], streams: Sequence[int], tokens: float | None) -> list[dict]:
    """A row for every pair: params, streams, loss (nats), dense_params (the N' of the same loss at P=1), ratio N'/N,
    exponent φ with N' = N·P^φ (None at P=1), extrapolated (outside the runs that the law was fitted to)."""
    return [
        {
            "params": n,
            "streams": p,
            "loss": law.predict(n, p, tokens),
            "dense_params": (dense := equivalent_params(law, n, p, tokens)),
            "ratio": dense / n,
            "exponent": equivalence_exponent(law, n, p, tokens) if p > 1 else None,
            "extrapolated": not law.runs.surround(n, p, tokens),
        }
        for n in params
        for p in streams
    ]


def _residual_rows(law: Law) -> list[dict[str, float]]:
    runs = law.runs
    columns = zip(runs.params, runs.streams, runs.loss, law.residuals)
    return [
        {"params": float(n), "streams": float(p), "loss": float(loss), "predicted": float(loss + r), "error": float(r)}
        for n, p, loss, r in columns
    ]


def _left_out_rows(law: Law) -> list[dict[str, Any]]:
    return [
        {
            "params": row["params"],
            "coefficients": row["coefficients"],
            "rmse": float(np.sqrt(np.mean(row["errors"] ** 2))),
        }
        for row in leave_one_out(law, law.runs.size)
    ]


def _rival_row(rival: Any) -> dict[str, Any]:
    return {
        "form": rival.law.form.name,
        "formula": rival.law.form.formula,
        "coefficients": rival.law.coefficients,
        "objective": rival.law.objective,
        "r2": rival.law.r2,
        "left_out_run": rival.by_run,
        "left_out_size": rival.by_size,
        "left_out_streams": rival.by_streams,
    }


def _print_fit(report: dict[str, Any]) -> None:
    print(f"L(N, P) = {report['formula']}    {report['runs']} runs, R² = {report['r2']:.4f}, ", end="")
    print(f"objective {report['objective']:.5g}")
    intervals = report["intervals_95"]
    print_table(
        "Coefficients, 95 % intervals by bootstrap",
        [
            {"": n, "value": v, "low": intervals[n][0], "high": intervals[n][1]}
            for n, v in report["coefficients"].items()
        ],
    )
    print_table("Residuals, nats", report["residuals"])
    left_out = [
        {"without params": r["params"], "rmse": r["rmse"]} | r["coefficients"] for r in report["leave_one_size_out"]
    ]
    print_table("Fitted without one size, and the error on it (nats)", left_out)
    if "rivals" in report:
        columns = ("form", "r2", "left_out_run", "left_out_size", "left_out_streams", "formula")
        rows = [{name: rival[name] for name in columns} for rival in report["rivals"]]
        print_table("Rival forms: rmse in nats on runs, sizes and P left out", rows)
        print(report["verdict"])
    if "plot" in report:
        print(f"plot: {report['plot']}")
