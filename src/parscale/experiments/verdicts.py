"""From rows to a verdict: paired gains over the control, in its seed deviations, with an interval.

A gain is the control's validation loss minus a run's, of the same seed and text, in nats per token. Three seeds are
needed to decide; below that a claim is undecided, whatever the numbers.
"""

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from parscale.config import StreamsConfig
from parscale.experiments.runs import Run
from parscale.probe import MONOCULTURE_WEIGHT, unsmoothed

Outcome = Literal["supported", "not supported", "undecided", "not run"]
Row = dict[str, Any]
SEEDS = 3
WORTH = 0.02
"""Nats, or a share of weights or attention. Where the whole interval of a gain is below it, there is none worth
having."""
ROUNDING = 1e-9
"""Nats: a spread below it is none."""


@dataclass(frozen=True)
class Gain:
    """Of one run over another. `deviations`: of losses, the mean in standard deviations of the other's over seeds;
    `low` and `high`: 95 % interval of the mean, over seeds. NaN where one seed leaves them open. `worth`: the least
    gain that counts as one."""

    mean: float
    deviations: float
    low: float
    high: float
    seeds: int
    worth: float = WORTH

    @property
    def outcome(self) -> Outcome:
        """Whether there is a gain: the interval is above 0, or not worth having anywhere, or neither."""
        if self.seeds < SEEDS:
            return "not run" if self.seeds == 0 else "undecided"
        if self.low > 0:
            return "supported"
        return "not supported" if self.high <= self.worth else "undecided"

    def __str__(self) -> str:
        if self.seeds == 0:
            return "not run"
        if self.seeds == 1:
            return f"{self.mean:+.4f} (one seed)"
        spread = "" if math.isnan(self.deviations) else f", {self.deviations:+.1f} sd"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]{spread}, {self.seeds} seeds"


@dataclass(frozen=True)
class Verdict:
    """What the rows say of a claim. `parts`: of each text and P that it is judged at; `table`: rows of plain values
    under the same keys; `curves`: points by label."""

    parts: Sequence[Outcome]
    reason: str
    table: list[Row] = field(default_factory=list)
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    axes: tuple[str, str] = ("", "")
    cloud: bool = False
    """Whether the points are single runs, and not places of a curve."""

    @property
    def outcome(self) -> Outcome:
        return combine(self.parts)

    @property
    def told_parts(self) -> str:
        """How many parts say what, where they do not all say the same: `5 supported, 1 undecided`."""
        counts = Counter(part for part in self.parts if part != "not run")
        return ", ".join(f"{count} {part}" for part, count in counts.most_common()) if len(counts) > 1 else ""


NOT_RUN = Verdict([], "No rows.")


def loss(row: Row) -> float:
    return row["validation_loss"]


def gain_of(values: Sequence[float], reference: Sequence[float], worth: float = WORTH, of_losses: bool = False) -> Gain:
    """`reference` minus `values`, pair by pair: one entry a seed, in the same order."""
    nothing = float("nan")
    gains = np.subtract(reference, values)
    if len(gains) == 0:
        return Gain(nothing, nothing, nothing, nothing, 0)
    mean = float(gains.mean())
    if len(gains) == 1:
        return Gain(mean, nothing, nothing, nothing, 1)
    spread = statistics.stdev(reference) if of_losses else 0.0
    low, high = interval(gains.tolist())
    return Gain(mean, mean / spread if spread > ROUNDING else nothing, low, high, len(gains), worth)


def keeps(share: float, values: Sequence[float], whole: Sequence[float], reference: Sequence[float]) -> Gain:
    """The gain of `values` over `reference` less `share` of that of `whole`: losses, one entry a seed."""
    least = [theirs - share * (theirs - most) for most, theirs in zip(whole, reference, strict=True)]
    return gain_of(values, least, worth=0)


def over_another(values: Sequence[float], own: Sequence[float], reference: Sequence[float]) -> list[float]:
    """Losses that gain over `reference` what `values` gain over a reference of their `own`: one entry a seed."""
    return [theirs - (alone - ours) for ours, alone, theirs in zip(values, own, reference, strict=True)]


def outcome_of_share(kept: Gain, whole: Gain) -> Outcome:
    """Whether a share of a gain is kept (`keeps`): undecided where that gain, the `whole`, is itself in doubt, for a
    run that loses less than another one keeps nothing."""
    return kept.outcome if kept.seeds == 0 or whole.outcome == "supported" else "undecided"


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean by Student's t. With three values a bootstrap would hardly reach past the values
    themselves, and miss the mean far more often than it says."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half


def paired(
    rows: Sequence[Row],
    name: str,
    reference: str,
    value: Callable[[Row], float] = loss,
    reference_value: Callable[[Row], float] = loss,
) -> Gain:
    """The gain of the run `name` over the run `reference`, over the seeds that both have. Rows of one text."""
    ours, theirs = of_common_seeds(rows, name, reference)
    of_losses = value is loss and reference_value is loss
    return gain_of([value(row) for row in ours], [reference_value(row) for row in theirs], of_losses=of_losses)


def growth(rows: Sequence[Row], before: tuple[str, str], after: tuple[str, str]) -> Gain:
    """By how much the gain of one run over its control is above that of another one: pairs of names, run and control,
    over the seeds that all four have. Rows of one text."""
    few, of_few, many, of_many = losses_of(rows, *before, *after)
    return gain_of(np.subtract(of_few, few).tolist(), np.subtract(of_many, many).tolist())


def by_seed(rows: Sequence[Row], name: str) -> dict[int, Row]:
    return {row["seed"]: row for row in rows if row["name"] == name}


def of_common_seeds(rows: Sequence[Row], *wanted: str) -> list[list[Row]]:
    """The rows of each run of these names, one for each seed that all of them have. Rows of one text."""
    of = [by_seed(rows, name) for name in wanted]
    seeds = sorted(set.intersection(*(set(one) for one in of)))
    return [[one[seed] for seed in seeds] for one in of]


def losses_of(rows: Sequence[Row], *wanted: str) -> list[list[float]]:
    """Losses of each run of these names, over the seeds that all of them have. Rows of one text."""
    return [[loss(row) for row in one] for one in of_common_seeds(rows, *wanted)]


def by_corpus(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of each text, in the order in which the texts came."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["corpus"], []).append(row)
    return found


def runs_of(rows: Sequence[Row]) -> dict[str, Run]:
    """The runs of judged rows by name, in the order in which they came."""
    return {row["name"]: row["of"] for row in rows}


def names(rows: Sequence[Row]) -> list[str]:
    """Names of the runs, in the order in which they came."""
    return list(dict.fromkeys(row["name"] for row in rows))


def over_control(rows: Sequence[Row], control: str = "control") -> list[Row]:
    """The table of most claims: every run's mean loss and its gain over the control, text by text."""
    table = []
    for corpus, of_corpus in by_corpus(rows).items():
        for name in names(of_corpus):
            seen = by_seed(of_corpus, name).values()
            gain = paired(of_corpus, name, control)
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                    "gain over control": "" if name == control else str(gain),
                }
            )
    return table


def mean_loss(rows: Iterable[Row]) -> float:
    """Of a run, over its seeds."""
    return statistics.mean(loss(row) for row in rows)


def largest_weight(row: Row) -> float:
    """The mean weight of the stream that has the most."""
    return max(row["measured"]["weights"])


def largest_given(row: Row) -> float:
    """The same as the head gives it: of every weight ε/P is given to each stream, whatever the head says."""
    return unsmoothed(largest_weight(row), row["streams"], streams_of(row).smoothing)


def streams_of(row: Row) -> StreamsConfig:
    """The streams of its run, which tells what is not as by default."""
    return StreamsConfig(**row["run"].get("streams", {}))


def imbalance(rows: Sequence[Row]) -> Row:
    """Columns that tell how unevenly the streams of a run, of all seeds, are used."""
    monoculture = sum(largest_given(row) > MONOCULTURE_WEIGHT for row in rows)
    largest = statistics.mean(largest_weight(row) for row in rows)
    return {"largest weight": largest, "monoculture": f"{monoculture} of {len(rows)}"}


def combine(outcomes: Sequence[Outcome]) -> Outcome:
    """Of all parts of a claim: what all say, or undecided. Parts that were not run are left out."""
    run: set[Outcome] = set(outcomes)
    run.discard("not run")
    if not run:
        return "not run"
    return run.pop() if len(run) == 1 else "undecided"


def gain_points(rows: Sequence[Row], runs: dict[str, tuple[str, float]], control: str = "control") -> dict[str, Any]:
    """Curves of mean gains: `runs` tells each run's curve and place on the x axis."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for corpus, of_corpus in by_corpus(rows).items():
        for name, (curve, x) in runs.items():
            gain = paired(of_corpus, name, control)
            if gain.seeds:
                curves.setdefault(f"{corpus}, {curve}", []).append((x, gain.mean))
    return curves
