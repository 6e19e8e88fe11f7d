"""What keeps many streams in use, and is it worth loss?"""

from collections.abc import Sequence
from typing import Any

from parscale.experiments.claim import Claim
from parscale.experiments.runs import EVEN, SLOW, Run, Scale, against
from parscale.experiments.verdicts import (
    Gain,
    Row,
    Verdict,
    by_corpus,
    by_seed,
    gain_points,
    imbalance,
    mean_loss,
    paired,
    runs_of,
)
from parscale.train.config import Balance

FREE = "no remedy"
CHOSEN = "slow head"
"""By its loss at P = 8 and seed 0; the other seeds came after."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """All remedies at the most streams of the scale, where a learned head picks one soonest; the load balance at every
    P, and the slow head there and at twice the most."""
    most = scale.streams[-1]
    remedies = {
        "annealed ε": Balance(smoothing_start=1.0),
        "annealed temperature": Balance(temperature_start=10.0),
        "entropy floor": Balance(entropy_floor=most / 2),
        "decorrelation": Balance(decorrelation=0.1),
        "stream dropout": Balance(stream_dropout=0.1),
    }
    few = scale.streams[-2]  # where a head that starts at zero picks one stream in some seeds alone
    ways: list[tuple[int, str, dict[str, Any], dict[str, Any]]] = []
    for p in scale.streams:
        ways += [(p, FREE, {}, {}), (p, "load balance", {}, EVEN)]
    ways += [(p, CHOSEN, {}, SLOW) for p in (*scale.streams, 2 * most)]
    ways += [(most, name, {}, {"balance": balance}) for name, balance in remedies.items()]
    ways += [
        (most, f"{CHOSEN} and load balance", {}, EVEN | SLOW),
        (most, "mean", {"aggregate": "mean"}, {}),
        (few, "random head", {"head_init": "random"}, {}),
    ]
    found = []
    for corpus in corpora:
        streamed = [
            scale.run(f"P={p}, {name}", corpus, scale.lora(p, **streams), variant=name, **training)
            for p, name, streams, training in ways
        ]
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the remedy that all runs from scratch have beats none at the most streams. The others are told:
    the best of many, picked by the loss that it is judged by, would beat none by luck."""
    table, outcomes, said = [], [], []
    for corpus, of in by_corpus(rows).items():
        by_count: dict[int, Gain] = {}
        for name, run in runs_of(of).items():
            if run.control is None:
                continue
            p, remedy = run.streams.streams, run.variant
            over_none = paired(of, name, f"P={p}, {FREE}")
            seen = list(by_seed(of, name).values())
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                    "gain over control": str(paired(of, name, "control")),
                    "gain over no remedy": "" if remedy == FREE else str(over_none),
                }
                | imbalance(seen)
            )
            if remedy == CHOSEN and over_none.seeds:
                by_count[p] = over_none
        for p, gain in sorted(by_count.items()):
            said.append(f"P={p} on {corpus}: {CHOSEN} over no remedy {gain}")
            if p == max(by_count):
                outcomes.append(gain.outcome)
    streamed = {name: run for name, run in runs_of(rows).items() if run.control is not None}
    places = {name: (run.variant, float(run.streams.streams)) for name, run in streamed.items()}
    return Verdict(outcomes, "; ".join(said) + ".", table, gain_points(rows, places), AXES)


AXES = ("P", "gain over the control (nats)")
CLAIM = Claim(
    "balance",
    "With many streams a remedy against weight monoculture ends at a lower loss than none.",
    "Not in the paper, which has ε = 0.1 alone. A learned head picks one of eight streams early; what keeps the others "
    "in use until they differ should pay.",
    runs,
    verdict,
)
