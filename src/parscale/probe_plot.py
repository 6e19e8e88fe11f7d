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
    rows = 4 if history else 2
    figure = Figure(figsize=(17, 3.4 * rows), dpi=110, layout="constrained")
    axes = figure.subplots(rows, 5)
    seen = details.probe
    _bars(axes[0, 0], seen.weights, "mean weight", 1 / seen.streams, "equal")
    _losses(axes[0, 1], details)
    _bars(axes[0, 2], details.gradient_share, "share of the gradient", 1 / seen.streams, "equal")
    _layers(axes[0, 3], seen.layer_cosine, "cosine of the streams", (None, 1.02))
    _layers(axes[0, 4], details.spectrum_streams, "effective streams (covariance)", (0.9, seen.streams + 0.1))
    _by_stream(axes[1, 0], details.prefix_attention, "layer", "attention on the prefix")
    _by_stream(axes[1, 1], details.prefix_attention_by_position, "part of the sequence", "attention on the prefix")
    _by_stream(axes[1, 2], details.weights_by_position, "part of the sequence", "mean weight")
    _in_use(axes[1, 3], details)
    _errors(axes[1, 4], details)
    if history:
        for panel, (quantity, curves) in zip(axes[2:].flat, OVER_TRAINING.items(), strict=True):
            _over_training(panel, history, quantity, curves)
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


def _layers(axes: Any, values: list[float], label: str, limits: tuple[float | None, float | None]) -> None:
    axes.plot(range(1, len(values) + 1), values, "o-", markersize=4, color="#3b6fb6")
    axes.set(xlabel="layer", ylabel=label, xticks=_ticks(len(values)))
    axes.set_ylim(*limits)


def _in_use(axes: Any, details: StreamDetails) -> None:
    """How many streams there are in effect, by either count."""
    seen = details.probe
    counts = {"weights' entropy": seen.effective_streams}
    counts |= {"covariance,\nlast layer": details.spectrum_streams[-1]} if details.spectrum_streams else {}
    axes.bar(list(counts), list(counts.values()), color="#3b6fb6", width=0.5)
    axes.axhline(seen.streams, color="black", linewidth=0.8, linestyle="--", label="all")
    axes.set(ylabel="effective streams", ylim=(0, seen.streams * 1.15))
    axes.legend(frameon=False, fontsize=8)


def _errors(axes: Any, details: StreamDetails) -> None:
    rho = details.probe.error_correlation
    if rho is None or details.loss_factor is None:
        _nothing(axes, "error correlation: no control")
        return
    names = ["ρ of the\nstreams' errors", "[(P−1)ρ+1]/P:\nloss that stays"]
    axes.bar(names, [rho, details.loss_factor], color=["#3b6fb6", "#b6503b"], width=0.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(ylim=(min(0.0, rho) - 0.05, 1.05))


def _by_stream(axes: Any, rows: list[list[float]], label: str, quantity: str) -> None:
    if not rows:
        _nothing(axes, "no prefix")
        return
    for stream, values in enumerate(zip(*rows, strict=True)):
        axes.plot(range(1, len(values) + 1), values, "o-", markersize=3, label=f"stream {stream + 1}")
    axes.set(xlabel=label, ylabel=quantity, xticks=_ticks(len(rows)))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=7, ncols=2)


OVER_TRAINING = {
    "loss, nats a token": ("eval_loss", "streams/loss_*"),
    "mean weight": ("streams/weight_*",),
    "merged loss without the stream": ("streams/loss_without_*",),
    "share of the gradient": ("streams/gradient_*",),
    "norm of the gradient": ("gradients/backbone", "gradients/head", "gradients/streams"),
    "cosine of the streams": ("streams/cosine_layer_*",),
    "effective streams": ("streams/effective", "streams/effective_layer_*"),
    "attention on the prefix, by stream": ("streams/prefix_attention_*",),
    "attention on the prefix, by layer": ("streams/prefix_attention_layer_*",),
    "errors against the control": ("streams/error_correlation", "streams/loss_factor"),
}
"""Quantity → the entries of a training log that are drawn of it; a star stands for a number."""
NAMES = {
    "eval_loss": "validation",
    "streams/effective": "weights' entropy",
    "streams/error_correlation": "ρ",
    "streams/loss_factor": "[(P−1)ρ+1]/P",
}


def _over_training(axes: Any, history: list[dict[str, Any]], quantity: str, curves: tuple[str, ...]) -> None:
    found = {key: None for row in history for key in row if any(_matches(key, curve) for curve in curves)}
    if not found:
        _nothing(axes, f"{quantity}: not in the log")
        return
    for key in found:
        points = [(row["step"], row[key]) for row in history if key in row]
        axes.plot(*zip(*points, strict=True), "o-" if key == "eval_loss" else "-", markersize=3, label=_label(key))
    axes.set(xlabel="step", ylabel=quantity)
    axes.legend(frameon=False, fontsize=7, ncols=2)
    if quantity == "norm of the gradient":
        axes.set_yscale("log")


def _matches(key: str, curve: str) -> bool:
    return key == curve or (curve.endswith("*") and key.startswith(curve[:-1]) and key[len(curve) - 1 :].isdigit())


def _label(key: str) -> str:
    name, _, number = key.rpartition("_")
    if key in NAMES or not number.isdigit():
        return NAMES.get(key, key.partition("/")[2])
    return f"{'layer' if name.endswith('layer') else 'stream'} {int(number) + 1}"


def _nothing(axes: Any, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", transform=axes.transAxes)
    axes.set_axis_off()


def _history(run: Path | None) -> list[dict[str, Any]]:
    file = None if run is None else run / "train.json"
    if file is None or not file.is_file():
        return []
    return json.loads(file.read_text(encoding="utf-8"))["result"]["history"]


def _ticks(count: int) -> list[int]:
    return list(range(1, count + 1, max(1, count // 8)))
