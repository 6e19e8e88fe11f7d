"""Which way to merge is best: the learned weights, the mean, the best stream alone, or the mean of the predictions?"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, gain_of, mean_loss, paired, runs_of


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """The learned weights at a slow rate, which is how they start best (claim `balance`); a mean has none."""
    rates: dict[str, dict[str, Any]] = {"learned": SLOW, "mean": {}}
    found = []
    p = 4
    for corpus in corpora:
        streamed = [
            scale.run(f"P={p}, {way}, {aggregate}", corpus, make(p, aggregate=aggregate), **rate, variant=way)
            for way, make in (("prefix", scale.prefix), ("prefix+lora", scale.lora))
            for aggregate, rate in rates.items()
        ]
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    table, outcomes, said = [], [], []
    for corpus, of in by_corpus(rows).items():
        for learned, run in runs_of(of).items():
            if run.control is None or run.streams.aggregate != "learned":
                continue
            gain = paired(of, learned, f"P={run.streams.streams}, {run.variant}, mean")
            outcomes.append(gain.outcome)
            said.append(f"{learned} over mean on {corpus}: {gain}")
            measured = [row["measured"] for row in by_seed(of, learned).values()]
            for way, other in WAYS.items():
                over = gain_of([m["merged"] for m in measured], [other(m) for m in measured])
                said.append(f"its weights over {way} of the same model: {over}")
        for name in runs_of(of):
            seen = list(by_seed(of, name).values())
            if measured := [row["measured"] for row in seen if row["measured"]]:
                gain = paired(of, name, "control")
                about = {"text": corpus, "run": name, "seeds": len(seen), "loss": mean_loss(seen)}
                table.append(about | {"gain over control": str(gain)} | _ways(measured))
    reason = "Learned weights over the mean, each trained so: " + "; ".join(said) + "."
    return Verdict(outcomes, reason, table)


WAYS: dict[str, Callable[[dict], float]] = {
    "mean of states (= of logits)": lambda measured: measured["uniform"],
    "mean of probabilities": lambda measured: measured["probabilities"],
    "best stream alone": lambda measured: min(measured["alone"]),
}
"""Other ways to merge the streams of a model that was trained with learned weights."""


def _ways(measured: list[dict]) -> dict:
    """Mean losses over seeds, merged in every way, on the part of the text that they are all measured on."""
    mean = statistics.mean
    return (
        {"on a part of the text: as trained": mean(m["merged"] for m in measured)}
        | {way: mean(map(other, measured)) for way, other in WAYS.items()}
        | {"largest weight": mean(max(m["weights"]) for m in measured)}
    )


CLAIM = Claim(
    "aggregation",
    "A learned, token-wise weighted sum of the streams beats their mean.",
    "Better (paper, table 1). With a linear LM head the mean of the logits is the mean of the hidden states, so these "
    "are one column; the mean of the probabilities is another.",
    runs,
    verdict,
)
