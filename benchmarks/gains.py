"""What streams gained in the sweeps, drawn: one panel a stage, gain over the control by P, with 95 % intervals.

    python benchmarks/gains.py --plot docs/img/gains.png

Reads `results/experiments/sharing.jsonl`, the rows that `parscale experiment sharing --scale cpu` wrote.
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from parscale.experiments.sweep import read_rows
from parscale.experiments.verdicts import Gain, by_corpus, by_seed, paired
from parscale.law.plot import save_figure

ROWS = Path(__file__).parent / "results/experiments/sharing.jsonl"
STAGES = {"pretrain": "from scratch", "retrofit": "stage 2", "frozen": "frozen backbone"}
STREAMS = (2, 4, 8)
EQUAL = 4
"""The P at which one stream with the LoRA parameters of so many was trained."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--corpus", default="code")
    arguments.add_argument("--plot", type=Path, required=True)
    options = arguments.parse_args()
    rows = by_corpus([row for row in read_rows(ROWS) if row["scale"] == "cpu"])[options.corpus]
    figure = Figure(figsize=(11, 3.6), dpi=110, layout="constrained")
    for axes, (stage, title) in zip(figure.subplots(1, 3, sharey=True), STAGES.items(), strict=True):
        control, equal = f"{stage}, control", f"{stage}, P=1, LoRA of {EQUAL} streams"
        for shift, (kv, label, color) in enumerate(
            (("own", "keys of their own", "C0"), ("shared", "one KV cache", "C1"))
        ):
            gains = [paired(rows, f"{stage}, P={p}, {kv}", control) for p in STREAMS]
            places = [i + 0.08 * shift for i in range(len(STREAMS))]
            _draw(axes, places, gains, color, label, "o-")
            over_equal = [paired(rows, f"{stage}, P={EQUAL}, {kv}", equal)]
            place = STREAMS.index(EQUAL) + 0.08 * shift + 0.2
            _draw(axes, [place], over_equal, color, "the same, over their LoRA in one stream", "^")
        axes.axhline(0, color="0.6", linewidth=0.8)
        axes.set(title=title, xlabel="streams P", xticks=range(len(STREAMS)), xticklabels=STREAMS)
    figure.axes[0].set_ylabel("gain over the control, nats a token")
    figure.axes[0].legend(frameon=False, fontsize=8, loc="upper left")
    seeds = len(by_seed(rows, f"{stage}, control"))
    figure.suptitle(f"{options.corpus}: mean of {seeds} seeds and its 95 % interval", fontsize=10)
    print(save_figure(figure, options.plot))


def _draw(axes: Any, places: list[float], gains: list[Gain], color: str, label: str, style: str) -> None:
    means = [gain.mean for gain in gains]
    reach = [[gain.mean - gain.low for gain in gains], [gain.high - gain.mean for gain in gains]]
    axes.errorbar(places, means, reach, fmt=style, color=color, label=label, capsize=3, markersize=5)


if __name__ == "__main__":
    main()
