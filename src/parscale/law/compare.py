"""Which form of law the data support: rival forms on the same runs, judged by the errors on runs left out."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from parscale.law.fit import Law, fit, leave_one_out, why_not_identifiable
from parscale.law.forms import FORMS, Form
from parscale.law.runs import Runs, read_runs


@dataclass(frozen=True)
class Rival:
    """One form on the data. `by_run`, `by_size`, `by_streams`: root mean squared error of losses left out, in nats.

    NaN where no group can be left out (two values of streams only, say). A run is left out with all its seeds.
    `held_out`: the mean squared error of each such run, behind `by_run`.
    """

    law: Law
    by_run: float
    by_size: float
    by_streams: float
    held_out: np.ndarray


@dataclass(frozen=True)
class Comparison:
    """All rivals, best cross-validation by run first; `supported` are those the data cannot tell from the best."""

    rivals: list[Rival]
    supported: list[str]
    verdict: str


def compare(runs: Any) -> Comparison:
    """Fit every form that the runs can determine and leave out each run (with all its seeds: what is left of them would
    tell what is to be predicted), each size and each P in turn.

    The best form has the least squared error over runs left out. A rival stands beside it when its mean excess of
    squared error is within one standard error of that excess (paired over runs); among those, fewer coefficients are
    the simpler law.
    """
    table = runs if isinstance(runs, Runs) else read_runs(runs)
    rivals = sorted((_rival(table, f) for f in _determined(table)), key=lambda r: r.by_run)
    if len(rivals) < 2:
        return Comparison(rivals, [r.law.form.name for r in rivals], "Too few runs to compare forms of law.")
    best = rivals[0]
    close = [r for r in rivals if _excess(r, best)[0] <= _excess(r, best)[1] + 1e-12]
    return Comparison(rivals, [r.law.form.name for r in close], _verdict(rivals, close))


def _determined(runs: Runs) -> list[Form]:
    many = len(np.unique(runs.configuration))
    return [f for f in FORMS.values() if len(f.coefficients) < many and why_not_identifiable(runs, f) is None]


def _rival(runs: Runs, form: Form) -> Rival:
    law = fit(runs, form.name)
    same = runs.configuration
    held_out = np.full(same.max() + 1, np.nan)
    for row in leave_one_out(law, same):
        held_out[row["left_out"]] = np.mean(row["errors"] ** 2)
    return Rival(
        law, _rms(np.sqrt(held_out)), _rms(_errors(law, runs.size)), _rms(_errors(law, runs.streams)), held_out
    )


def _errors(law: Law, groups: np.ndarray) -> np.ndarray:
    return np.concatenate([np.empty(0), *(row["errors"] for row in leave_one_out(law, groups))])


def _rms(errors: np.ndarray) -> float:
    known = errors[np.isfinite(errors)]
    return float(np.sqrt(np.mean(known**2))) if len(known) else float("nan")


def _excess(rival: Rival, best: Rival) -> tuple[float, float]:
    """Mean squared held-out error above the best form's, and the standard error of that mean, nats²."""
    more = rival.held_out - best.held_out
    more = more[np.isfinite(more)]
    return float(more.mean()), float(more.std(ddof=1) / np.sqrt(len(more))) if len(more) > 1 else 0.0


def _verdict(rivals: list[Rival], close: list[Rival]) -> str:
    best = rivals[0]
    sentence = f"Left-out runs are predicted best by {best.law.form.name!r} ({best.by_run:.4f} nats)"
    others = [f"{r.law.form.name!r} ({r.by_run:.4f})" for r in close[1:]]
    sentence += f"; the data cannot tell it from {', '.join(others)}" if others else "; every other form is worse"
    simplest = min(close, key=lambda r: (len(r.law.coefficients), r.by_run))
    if simplest is not best:
        sentence += f"; the simplest of these is {simplest.law.form.name!r}"
    paper = next((r for r in rivals if r.law.form.name == "paper"), None)
    if paper is not None and all(r is not paper for r in close):
        more, error = _excess(paper, best)
        sentence += f"; the paper's form ({paper.by_run:.4f}) is {more / error:.1f} standard errors behind"
    return sentence + "."
