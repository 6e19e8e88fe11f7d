"""Does the measured correlation of the streams' errors predict the gain, as section 2 of the paper has it?"""

from collections.abc import Sequence

import numpy as np

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against, remedy
from parscale.experiments.verdicts import SEEDS, Outcome, Row, Verdict, by_corpus, by_seed, loss

RESAMPLES = 10_000
LEAST = 6
"""Runs on a text that a rank correlation is told for."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    found = []
    for corpus in corpora:
        streamed = [
            scale.run(f"P={p}, {way}", corpus, make(p), **rate)
            for p in scale.streams
            for way, make, rate in (("prefix", scale.prefix, {}), ("prefix+lora", scale.lora, remedy(p)))
        ]
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """The theory leaves [(P−1)ρ+1]/P of the reducible loss, so the gain over the control's loss is at most the rest;
    it holds where the measured gain rises with 1 − [(P−1)ρ+1]/P over all runs."""
    table = []
    # text → run → of each seed: P, the share that goes by theory, the gain
    seen: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for corpus, of in by_corpus(rows).items():
        control = by_seed(of, "control")
        for row in of:
            rho = row["measured"].get("rho")
            if rho is None or row["seed"] not in control:
                continue
            p = row["streams"]
            left = ((p - 1) * rho + 1) / p
            gain = loss(control[row["seed"]]) - loss(row)
            seen.setdefault(corpus, {}).setdefault(row["name"], []).append((p, 1 - left, gain))
            table.append(
                {
                    "text": corpus,
                    "run": row["name"],
                    "seed": row["seed"],
                    "ρ": rho,
                    "[(P−1)ρ+1]/P": left,
                    "gain": gain,
                    "reducible loss that this would take": gain / (1 - left),
                    "loss of the control": loss(control[row["seed"]]),
                }
            )
    by_run = {
        corpus: [np.array(seeds) for seeds in of.values()]
        for corpus, of in seen.items()
        if sum(map(len, of.values())) >= LEAST
    }
    if not by_run:
        return Verdict(["undecided"] if table else [], f"Fewer than {LEAST} runs with streams on a text.", table)
    slopes = {corpus: _rank_correlation([run[:, 1:] for run in of]) for corpus, of in by_run.items()}
    said = []
    for corpus, (value, low, high) in slopes.items():
        by_p = _spearman(np.concatenate(by_run[corpus])[None, :, [0, 2]])[0]
        said.append(f"{corpus}: {value:+.2f} [{low:+.2f}, {high:+.2f}], of P alone and the gain {by_p:+.2f}")
    for corpus in by_run:
        took = [line["reducible loss that this would take"] for line in table if line["text"] == corpus]
        said.append(
            f"gains of the theory's size on {corpus} would take {min(took):.2f} to {max(took):.2f} reducible nats"
        )
    few = min(len(run) for of in by_run.values() for run in of) < SEEDS
    outcome: Outcome = "undecided"
    if few:
        said.append(f"fewer than {SEEDS} seeds of a run")
    elif all(low > 0 for _, low, _ in slopes.values()):
        outcome = "supported"
    elif all(high <= 0 for _, _, high in slopes.values()):
        outcome = "not supported"
    reason = "Rank correlation of the predicted share and the gain, over runs: " + "; ".join(said) + "."
    axes = ("share of the reducible loss that goes, by theory", "gain (nats)")
    points = {corpus: [(x, gain) for of_run in of.values() for _, x, gain in of_run] for corpus, of in seen.items()}
    return Verdict([outcome], reason, table, points, axes, cloud=True)


def _rank_correlation(runs: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """Spearman's over the points of all runs, (seeds, 2) each, with a 95 % bootstrap interval. Runs are drawn with all
    their seeds, which are no independent points of the theory."""
    draws = np.random.default_rng(0).integers(0, len(runs), (RESAMPLES, len(runs)))
    drawn = np.concatenate([_spearman(np.concatenate([runs[i] for i in draw])[None]) for draw in draws])
    low, high = np.percentile(drawn[np.isfinite(drawn)], [2.5, 97.5])  # a draw of one value has no correlation
    return float(_spearman(np.concatenate(runs)[None])[0]), float(low), float(high)


def _spearman(samples: np.ndarray) -> np.ndarray:
    """Of (samples, runs, 2): (samples,)."""
    from scipy.stats import rankdata

    ranks = rankdata(samples, axis=1)
    ranks -= ranks.mean(1, keepdims=True)
    x, y = ranks[..., 0], ranks[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


CLAIM = Claim(
    "theory",
    "Runs gain in the order of 1 − [(P−1)ρ+1]/P: the lower the streams' error correlation ρ, the more.",
    "The gain rises as ρ falls. The streams of small models specialise, so the size of the gain will not be the "
    "theory's, which takes each stream to be a whole model.",
    runs,
    verdict,
)
