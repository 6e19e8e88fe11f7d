"""How the streams look: one picture of all that `parscale probe` measures, and of how a training run came there."""

import json
from pathlib import Path
from typing import Any

from parscale.law.plot import save_figure
from parscale.probe_details import StreamDetails


def draw_probe(details: StreamDetails, path: str | Path, run: Path | None = None) -> Path:
    """Write the panels to `path` (.png, .svg or .pdf).

    Args:
        details: what was measured.
        run: a folder with the `train.json` of the model, for the panels over training.
    """
    from matplotlib.figure import Figure

    history = _history(run)
    rows = 3 if history else 2
    figure = Figure(figsize=(14, 3.6 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 4)
    seen = details.probe
    _bars(axes[0, 0], seen.weights, "mean weight", 1 / seen.streams, "equal")
    _losses(axes[0, 1], details)
    _bars(axes[0, 2], details.gradient_share, "share of the gradient", 1 / seen.streams, "equal")
    _layers(axes[0, 3], {"cosine of the streams": seen.layer_cosine}, (None, 1.02))
    _layers(axes[1, 0], {"effective streams (covariance)": details.spectrum_streams}, (0.9, seen.streams + 0.1))
    _by_stream(axes[1, 1], details.prefix_attention, "layer", "attention on the prefix")
    _by_stream(axes[1, 2], details.prefix_attention_by_position, "part of the sequence", "attention on the prefix")
    _by_stream(axes[1, 3], details.weights_by_position, "part of the sequence", "mean weight")
    if history:
        _over_training(axes[2], history, seen.streams)
    figure.suptitle(_title(details))
    return save_figure(figure, path)


def _title(details: StreamDetails) -> str:
    seen = details.probe
    title = f"{seen.streams} streams on {seen.tokens:,} held-out tokens: {seen.verdict}"
    if details.gain is not None and details.loss_factor is not None:
        title += (
            f"\nerror correlation ρ = {seen.error_correlation:.2f}: the paper's theory leaves "
            f"{details.loss_factor:.0%} of the reducible loss; measured gain {details.gain:+.4f} nats"
        )
    return title


def _bars(axes: Any, values: list[float], label: str, reference: float, name: str) -> None:
    axes.bar([str(i + 1) for i in range(len(values))], values, color="#3b6fb6")
    axes.axhline(reference, color="black", linewidth=0.8, linestyle="--", label=name)
    axes.set(xlabel="stream", ylabel=label)
    axes.legend(frameon=False, fontsize=8)


def _losses(axes: Any, details: StreamDetails) -> None:
    seen = details.probe
    streams = range(1, seen.streams + 1)
    axes.plot(streams, seen.stream_losses, "o", color="#b6503b", label="that stream alone")
    if details.loss_without:
        axes.plot(streams, details.loss_without, "s", color="#3b6fb6", label="all but that stream")
    axes.axhline(seen.loss, color="black", linewidth=0.8, label="merged")
    if details.gain is not None:
        axes.axhline(seen.loss + details.gain, color="gray", linestyle="--", linewidth=0.8, label="control")
    axes.set(xlabel="stream", ylabel="loss, nats a token", xticks=list(streams))
    axes.legend(frameon=False, fontsize=8)


def _layers(axes: Any, curves: dict[str, list[float]], limits: tuple[float | None, float | None]) -> None:
    for name, values in curves.items():
        axes.plot(range(1, len(values) + 1), values, "o-", markersize=4, color="#3b6fb6")
        axes.set(xlabel="layer", ylabel=name, xticks=_ticks(len(values)))
    axes.set_ylim(*limits)


def _by_stream(axes: Any, rows: list[list[float]], label: str, quantity: str) -> None:
    if not rows:
        axes.text(0.5, 0.5, "no prefix", ha="center", va="center", transform=axes.transAxes)
        axes.set_axis_off()
        return
    for stream, values in enumerate(zip(*rows, strict=True)):
        axes.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=f"stream {stream + 1}")
    axes.set(xlabel=label, ylabel=quantity, xticks=_ticks(len(rows)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, ncols=2)


def _over_training(axes: Any, history: list[dict[str, Any]], streams: int) -> None:
    losses = [(row["step"], row["eval_loss"]) for row in history if "eval_loss" in row]
    axes[0].plot(*zip(*losses, strict=True), "o-", markersize=3, color="black")
    axes[0].set(xlabel="step", ylabel="validation loss")
    for panel, names in (
        (axes[1], [f"streams/weight_{i}" for i in range(streams)]),
        (axes[2], ["streams/cosine", "streams/effective"]),
        (axes[3], ["gradients/backbone", "gradients/head", "gradients/streams"]),
    ):
        for name in names:
            points = [(row["step"], row[name]) for row in history if name in row]
            if points:
                panel.plot(*zip(*points, strict=True), linewidth=1, label=_label(name))
        panel.set(xlabel="step", ylabel=names[0].partition("/")[0])
        panel.legend(frameon=False, fontsize=7)
    axes[3].set_yscale("log")


def _label(name: str) -> str:
    quantity, _, stream = name.partition("/")[2].partition("_")
    return f"stream {int(stream) + 1}" if stream else quantity


def _history(run: Path | None) -> list[dict[str, Any]]:
    file = None if run is None else run / "train.json"
    if file is None or not file.is_file():
        return []
    return json.loads(file.read_text(encoding="utf-8"))["result"]["history"]


def _ticks(count: int) -> list[int]:
    return list(range(1, count + 1, max(1, count // 8)))
