"""Which way to merge is best: the learned weights, the mean, the best stream alone, or the mean of the predictions?"""

import statistics
from collections.abc import Sequence
from typing import Any

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, combine, names, paired


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """The learned weights at a slow rate, which is how they start best (claim `balance`); a mean has none."""
    rates: dict[str, dict[str, Any]] = {"learned": SLOW, "mean": {}}
    found = []
    p = 4
    for corpus in corpora:
        streamed = [
            scale.run(f"P={p}, {way}, {aggregate}", corpus, make(p, aggregate=aggregate), **rate)
            for way, make in (("prefix", scale.prefix), ("prefix+lora", scale.lora))
            for aggregate, rate in rates.items()
        ]
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    table, outcomes, said = [], [], []
    for corpus, of in by_corpus(rows).items():
        for learned in (name for name in names(of) if name.endswith(", learned")):
            gain = paired(of, learned, learned.removesuffix("learned") + "mean")
            outcomes.append(gain.outcome)
            said.append(f"{learned} over mean on {corpus}: {gain}")
        for name in names(of):
            measured = [row["measured"] for row in by_seed(of, name).values() if row["measured"]]
            if measured:
                table.append({"text": corpus, "run": name} | _ways(measured))
    reason = "Learned weights over the mean, each trained so: " + "; ".join(said) + "."
    return Verdict(combine(outcomes), reason, table)


def _ways(measured: list[dict]) -> dict:
    """Mean losses over seeds on the same tokens, merged in every way."""
    mean = statistics.mean
    return {
        "as trained": mean(m["merged"] for m in measured),
        "mean of states (= of logits)": mean(m["uniform"] for m in measured),
        "mean of probabilities": mean(m["probabilities"] for m in measured),
        "best stream alone": mean(min(m["alone"]) for m in measured),
        "largest weight": mean(max(m["weights"]) for m in measured),
    }


CLAIM = Claim(
    "aggregation",
    "A learned, token-wise weighted sum of the streams beats their mean.",
    "Better (paper, table 1). With a linear LM head the mean of the logits is the mean of the hidden states, so these "
    "are one column; the mean of the probabilities is another.",
    runs,
    verdict,
)
