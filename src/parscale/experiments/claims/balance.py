"""What keeps many streams in use, and is it worth loss?"""

import statistics
from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, combine, gain_points, names, paired
from parscale.probe import MONOCULTURE_WEIGHT
from parscale.train.config import Balance

FREE = "no remedy"


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """At the most streams of the scale, where a learned head picks one soonest."""
    p = scale.streams[-1]
    remedies = {
        FREE: Balance(),
        "annealed ε": Balance(smoothing_start=1.0),
        "load balance": Balance(load_balance=0.01),
        "entropy floor": Balance(entropy_floor=p / 2),
        "decorrelation": Balance(decorrelation=0.1),
        "stream dropout": Balance(stream_dropout=0.1),
    }
    found = []
    for corpus in corpora:
        streamed = [
            scale.run(f"P={p}, {remedy}", corpus, scale.lora(p), balance=balance)
            for remedy, balance in remedies.items()
        ]
        slow = 0.1 * scale.learning_rate
        streamed.append(scale.run(f"P={p}, slow head", corpus, scale.lora(p), head_learning_rate=slow))
        streamed.append(scale.run(f"P={p}, mean", corpus, scale.lora(p, aggregate="mean")))
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the best remedy, by its mean loss, beats none."""
    table, outcomes, said = [], [], []
    for corpus, of in by_corpus(rows).items():
        remedies = [name for name in names(of) if name != "control"]
        free = next((name for name in remedies if name.endswith(FREE)), None)
        for name in remedies:
            seen = list(by_seed(of, name).values())
            largest = [max(row["measured"]["weights"]) for row in seen]
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "loss": statistics.mean(row["validation_loss"] for row in seen),
                    "gain over control": str(paired(of, name, "control")),
                    "gain over none": "" if free in (None, name) else str(paired(of, name, free)),
                    "largest weight": statistics.mean(largest),
                    "monoculture": f"{sum(w > MONOCULTURE_WEIGHT for w in largest)} of {len(seen)}",
                }
            )
        gains = {name: paired(of, name, free) for name in remedies if free not in (None, name)}
        if gains:
            best = max(gains, key=lambda name: gains[name].mean)
            outcomes.append(gains[best].outcome)
            said.append(f"{best} over none on {corpus}: {gains[best]}")
    places = {name: (name.split(", ")[1], float(name[2:].split(",")[0])) for name in names(rows) if name != "control"}
    return Verdict(combine(outcomes), "; ".join(said) + ".", table, gain_points(rows, places), AXES)


AXES = ("P", "gain over the control (nats)")
CLAIM = Claim(
    "balance",
    "With many streams a remedy against weight monoculture ends at a lower loss than none.",
    "Not in the paper, which has ε = 0.1 alone. A learned head picks one of eight streams early; what keeps the others "
    "in use until they differ should pay.",
    runs,
    verdict,
)
