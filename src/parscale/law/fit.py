"""How a law is fitted to runs: the paper's objective, its multi-start, and what the data leave open.

Objective: Σ Huber_δ(ln L_predicted − ln L_measured) with δ = 0.001, minimised by L-BFGS-B from 300 starts (section 3).
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from threadpoolctl import threadpool_limits

from parscale.errors import InputError
from parscale.law.forms import Form
from parscale.law.forms import form as form_named
from parscale.law.runs import CORPORA, Runs, paper, read_runs

DELTA = 1e-3
# On 4 × 4 matrices BLAS threads only wait for each other: on a busy machine the fit takes 15 times the CPU time.
_one_thread = threadpool_limits.wrap(limits=1, user_api="blas")

_SCOUTS, _SCOUT_ITERATIONS, _FINALISTS = 80, 20, 8


@dataclass(frozen=True)
class Law:
    """A fitted law.

    `form`: its formula. `theta`: (E, ln A, α, …) as the optimiser sees them. `objective`: the sum of Huber terms.
    `runs`: what it was fitted to. `r2`: share of the variance of the losses explained.
    """

    form: Form
    theta: np.ndarray
    objective: float
    runs: Runs = field(repr=False)

    @property
    def coefficients(self) -> dict[str, float]:
        """Coefficients by name; A (and B) in billions of parameters (tokens)."""
        logs = {"A", "B"}
        return {n: float(np.exp(v) if n in logs else v) for n, v in zip(self.form.coefficients, self.theta)}

    @property
    def E(self) -> float:
        return self.coefficients["E"]

    @property
    def A(self) -> float:
        return self.coefficients["A"]

    @property
    def alpha(self) -> float:
        return self.coefficients["alpha"]

    @property
    def k(self) -> float:
        """k of k·ln P; InputError when the form has none."""
        if "k" not in self.coefficients:
            raise InputError(
                f"the form {self.form.name!r} has no k: its coefficients are {', '.join(self.coefficients)}"
            )
        return self.coefficients["k"]

    @property
    def is_exact(self) -> bool:
        """Whether distinct runs are as few as coefficients: the law passes through all, nothing tells its errors."""
        return len(np.unique(self.runs.configuration)) <= len(self.form.coefficients)

    @property
    def residuals(self) -> np.ndarray:
        """Predicted minus measured loss, nats, shape (runs,)."""
        return self.form.curve(self.theta, self.runs)[0] - self.runs.loss

    @property
    def r2(self) -> float:
        spread = self.runs.loss - self.runs.loss.mean()
        return float(1 - (self.residuals**2).sum() / (spread**2).sum())

    def predict(self, params: Any, streams: Any, tokens: Any = None) -> Any:
        """Loss in nats a token for `params` non-embedding parameters and `streams` streams; numbers or arrays.

        `tokens` is needed by the data form only. A float for numbers, an array of the broadcast shape otherwise.
        """
        if self.form.needs_tokens and tokens is None:
            raise InputError("tokens is missing: this law has a data term, so give the number of training tokens")
        for name, value in (("params", params), ("streams", streams), ("tokens", tokens)):
            if value is not None and not np.all(np.isfinite(value) & (np.asarray(value, dtype=float) > 0)):
                raise InputError(f"{name} is {value!r}: positive, finite numbers are needed")
        n, p, d = np.broadcast_arrays(
            *(np.asarray(v, float) for v in (params, streams, 1.0 if tokens is None else tokens))
        )
        at = Runs(n.ravel(), p.ravel(), np.ones(n.size), d.ravel(), np.zeros(n.size, int))
        loss = self.form.curve(self.theta, at)[0].reshape(n.shape)
        return float(loss) if loss.ndim == 0 else loss


@_one_thread
def fit(runs: Any, form: str = "paper") -> Law:
    """Fit a law to runs (CSV path, list of dicts or DataFrame; see `runs.read_runs`).

    Raises InputError when the runs cannot determine the form: fewer runs than coefficients, one value of streams (k is
    not identifiable), one size, or no spread of tokens for the data form.
    """
    law_form = form_named(form)
    table = runs if isinstance(runs, Runs) else read_runs(runs)
    _require_identifiable(table, law_form)
    return _minimise(table, law_form, _best_starts(table, law_form))


def law_of(source: str | Path, form: str | None = None) -> Law:
    """The law of "stack" or "pile", the paper's own losses, or of the runs in a CSV file.

    `form`: by default the paper's, with the data term if the runs have three or more token counts.

    Raises:
        InputError: the runs cannot determine the form, or have several token counts and the form no term for them.
    """
    runs = read_runs(paper(str(source)) if str(source) in CORPORA else source)
    counts = np.empty(0) if runs.tokens is None else np.unique(runs.tokens)
    chosen = form_named(form or ("data" if len(counts) > 2 else "paper"))
    if len(counts) > 1 and not chosen.needs_tokens:
        raise InputError(
            f"the runs have tokens from {counts[0]:.3g} to {counts[-1]:.3g}, for which the form {chosen.name!r} has no "
            "term: fit the form 'data' (three or more values), or give runs of one"
        )
    return fit(runs, chosen.name)


def bootstrap(law: Law, samples: int = 400, seed: int = 0) -> dict[str, tuple[float, float]]:
    """95 % intervals of the coefficients: percentiles over refits to runs drawn with replacement. NaN where runs are as
    few as coefficients: the law passes through every one of them, and they tell nothing of its errors."""
    if samples < 20:
        raise InputError(f"samples is {samples}: a 95 % interval needs at least 20 bootstrap samples")
    if law.is_exact:
        return dict.fromkeys(law.coefficients, (float("nan"), float("nan")))
    return percentiles(law, bootstrap_thetas(law, samples, seed))


@_one_thread
def bootstrap_thetas(law: Law, samples: int, seed: int = 0) -> np.ndarray:
    """The refits themselves, shape (samples, coefficients): what a prediction's uncertainty is computed from.

    Configurations are drawn, each with all its seeds, which are no independent runs of the law. A draw that could not
    determine the form (one value of streams, say) is drawn again.

    Raises:
        InputError: there are as few configurations as coefficients.
    """
    number = law.runs.configuration
    places = [np.flatnonzero(number == i) for i in range(number.max() + 1)]
    if law.is_exact:
        raise InputError(
            f"{len(places)} distinct runs leave nothing to tell the errors of the form {law.form.name!r} from: it has "
            f"{len(law.form.coefficients)} coefficients; give more runs"
        )
    rng = np.random.default_rng(seed)
    thetas = []
    while len(thetas) < samples:
        drawn = law.runs.take(np.concatenate([places[i] for i in rng.integers(0, len(places), len(places))]))
        if why_not_identifiable(drawn, law.form) is None:
            thetas.append(_minimise(drawn, law.form, [law.theta]).theta)
    return np.stack(thetas)


def percentiles(law: Law, thetas: np.ndarray) -> dict[str, tuple[float, float]]:
    """2.5th and 97.5th percentile of every coefficient over `thetas`, shape (samples, coefficients)."""
    refits = [Law(law.form, theta, 0.0, law.runs).coefficients for theta in thetas]
    low_high = {name: np.percentile([r[name] for r in refits], [2.5, 97.5]) for name in law.coefficients}
    return {name: (float(low), float(high)) for name, (low, high) in low_high.items()}


@_one_thread
def leave_one_out(law: Law, groups: np.ndarray) -> list[dict[str, Any]]:
    """Refit without each group of runs and predict it. `groups`: (runs,) labels, `law.runs.size` for the sizes.

    Each row: `left_out` (label), `params` (smallest of the group), `coefficients`, `errors` (predicted minus measured
    loss of the group's runs, nats). A group whose absence leaves the form undetermined is skipped.
    """
    rows = []
    for label in np.unique(groups):
        kept, left = law.runs.take(groups != label), law.runs.take(groups == label)
        if why_not_identifiable(kept, law.form) is not None:
            continue
        refit = _minimise(kept, law.form, [law.theta])
        errors = law.form.curve(refit.theta, left)[0] - left.loss
        rows.append(
            {
                "left_out": label.item(),
                "params": float(left.params.min()),
                "coefficients": refit.coefficients,
                "errors": errors,
            }
        )
    return rows


def huber_of_log_loss(theta: np.ndarray, runs: Runs, form: Form) -> tuple[float, np.ndarray]:
    """The objective Σ Huber_δ(ln L̂ − ln L) and its gradient, shape (coefficients,)."""
    loss, by_theta = form.curve(theta, runs)
    loss = np.maximum(loss, 1e-300)
    error = np.log(loss) - np.log(runs.loss)
    near = np.abs(error) <= DELTA
    value = np.where(near, error**2 / 2, DELTA * (np.abs(error) - DELTA / 2)).sum()
    slope = np.where(near, error, DELTA * np.sign(error)) / loss
    return float(value), by_theta @ slope


def _require_identifiable(runs: Runs, form: Form) -> None:
    reason = why_not_identifiable(runs, form)
    if reason is not None:
        raise InputError(reason)


def why_not_identifiable(runs: Runs, form: Form) -> str | None:
    """What the runs lack to determine the form, or None."""
    distinct = len(np.unique(np.stack([runs.params, runs.streams]), axis=1).T)
    if form.needs_tokens:
        if runs.tokens is None or len(np.unique(runs.tokens)) < 3:
            return f"the form {form.name!r} needs a tokens column with 3 or more values to identify its data term"
        distinct = len(np.unique(np.stack([runs.params, runs.streams, runs.tokens]), axis=1).T)
    if form.needs_streams and len(np.unique(runs.streams)) < 2:
        return (
            f"all runs have streams={runs.streams[0]:g}: k is not identifiable from one P; "
            "add runs at another P, or fit the form 'chinchilla', which has no P"
        )
    if distinct < len(form.coefficients):
        return (
            f"{distinct} distinct runs cannot determine the {len(form.coefficients)} coefficients "
            f"{', '.join(form.coefficients)} of the form {form.name!r}: give at least {len(form.coefficients)}"
        )
    if len(np.unique(runs.size)) < 2:
        return (
            f"all runs have one size (params about {runs.params[0]:.3g}): alpha is not identifiable; add another size"
        )
    return None


def _best_starts(runs: Runs, form: Form) -> list[np.ndarray]:
    """The most promising of the paper's starts: all are looked at, the better ones run for a few steps."""
    starts = [np.array(start) for start in itertools.product(*form.starts)]
    looked_at = sorted(starts, key=lambda start: huber_of_log_loss(start, runs, form)[0])
    scouted = [_descend(runs, form, start, _SCOUT_ITERATIONS) for start in looked_at[:_SCOUTS]]
    return [theta for _, theta in sorted(scouted, key=lambda found: found[0])[:_FINALISTS]]


def _minimise(runs: Runs, form: Form, starts: list[np.ndarray]) -> Law:
    value, theta = min((_descend(runs, form, start, 5000) for start in starts), key=lambda found: found[0])
    return Law(form, theta, value, runs)


def _descend(runs: Runs, form: Form, start: np.ndarray, iterations: int) -> tuple[float, np.ndarray]:
    # In units of δ² the objective is of order one, as scipy's stopping rule expects; unscaled, it stops early.
    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = huber_of_log_loss(theta, runs, form)
        return value / DELTA**2, gradient / DELTA**2

    limits: dict[str, Any] = {"maxiter": iterations, "maxfun": 3 * iterations, "ftol": 1e-13, "gtol": 1e-7}
    objective: Callable[..., Any] = scaled
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=form.bounds, options=limits)
    return float(found.fun) * DELTA**2, found.x
