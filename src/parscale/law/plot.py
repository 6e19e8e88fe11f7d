"""How a fitted law looks: loss against N for each P, contours over (N, P) as in the paper's figure 1, residuals."""

from pathlib import Path
from typing import Any

import numpy as np

from parscale.errors import InputError
from parscale.law.fit import Law
from parscale.law.runs import Runs
from parscale.utils.files import replacing

PLOT_SUFFIXES = (".png", ".svg", ".pdf")


def draw_law(law: Law, path: str | Path, title: str = "") -> Path:
    """Write the three panels to `path` (.png, .svg or .pdf); a law with a data term is drawn at the median tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13.5, 4.2), dpi=110, layout="constrained")
    curves, contours, residuals = figure.subplots(1, 3)
    tokens = float(np.median(law.runs.tokens)) if law.form.needs_tokens and law.runs.tokens is not None else None
    _draw_curves(curves, law, tokens)
    _draw_contours(contours, law, tokens)
    _draw_residuals(residuals, law)
    coefficients = ", ".join(f"{name} = {value:.4g}" for name, value in law.coefficients.items())
    figure.suptitle(f"{title + ': ' if title else ''}{coefficients}, R² = {law.r2:.4f}")
    return save_figure(figure, path)


def check_picture(path: Path) -> None:
    """Raise InputError unless a picture can be written under this name. Ask before the work, not after it."""
    if path.suffix.lower() not in PLOT_SUFFIXES:
        raise InputError(f"plot {str(path)!r} has no suffix of a picture: use one of {', '.join(PLOT_SUFFIXES)}")
    if path.is_dir():
        raise InputError(f"plot {str(path)!r} is a folder; give the name of a file in it")


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a picture whole or not at all. Returns `path`."""
    path = Path(path)
    check_picture(path)
    with replacing(path) as scratch:
        figure.savefig(scratch)
    return path


def _draw_curves(axes: Any, law: Law, tokens: float | None) -> None:
    runs = law.runs
    n = np.geomspace(runs.params.min() * 0.85, runs.params.max() * 1.15, 80)
    for i, p in enumerate(np.unique(runs.streams)):
        at = runs.streams == p
        axes.plot(n, law.predict(n, p, tokens), color=_color(i))
        axes.plot(runs.params[at], runs.loss[at], "o", color=_color(i), markersize=4, label=f"P = {p:g}")
    axes.set(ylabel="loss, nats a token", title="Runs and fit")
    _scale_by_size(axes, runs)
    axes.legend(frameon=False)


def _draw_contours(axes: Any, law: Law, tokens: float | None) -> None:
    runs = law.runs
    n = np.geomspace(runs.params.min(), runs.params.max(), 100)
    p = np.geomspace(1, max(runs.streams.max(), 2), 60)
    lines = axes.contour(n, p, law.predict(n[None, :], p[:, None], tokens), levels=12, cmap="viridis")
    axes.clabel(lines, fontsize=7, fmt="%.3f")
    axes.plot(runs.params, runs.streams, "k.", markersize=3)
    ticks = np.unique(runs.streams)
    axes.set(yscale="log", ylabel="P, streams", title="Equal loss")
    _scale_by_size(axes, runs)
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()


def _draw_residuals(axes: Any, law: Law) -> None:
    runs = law.runs
    for i, p in enumerate(np.unique(runs.streams)):
        at = runs.streams == p
        axes.plot(runs.params[at], 1e3 * law.residuals[at], "o-", color=_color(i), markersize=4, linewidth=0.7)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(ylabel="predicted − measured, 1e-3 nats", title="Residuals")
    _scale_by_size(axes, runs)


def _scale_by_size(axes: Any, runs: Runs) -> None:
    """A logarithmic axis of N, marked at the sizes that were trained."""
    sizes = [runs.params[runs.size == size].min() for size in np.unique(runs.size)]
    axes.set(xscale="log", xlabel="N, non-embedding parameters")
    axes.set_xticks(sizes, [short_count(n) for n in sizes])
    axes.minorticks_off()


def short_count(n: float) -> str:
    """A number of parameters as people say it: 1.57B, 694M."""
    return next((f"{n / unit:.3g}{name}" for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "K")) if n >= unit), f"{n:g}")


def _color(i: int) -> Any:
    return f"C{i % 10}"
