"""Does ε keep the weights balanced, and does it cost loss?"""

import statistics
from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against
from parscale.experiments.verdicts import (
    Outcome,
    Row,
    Verdict,
    by_corpus,
    by_seed,
    combine,
    imbalance,
    largest_given,
    mean_loss,
    paired,
    runs_of,
)
from parscale.probe import MONOCULTURE_WEIGHT

EPSILONS = (0.0, 0.01, 0.05, 0.1, 0.2)


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """As long as a stage 2, for it is many runs, and which stream is picked is settled early."""
    epsilons = (0.0, 0.1) if scale.name == "smoke" else EPSILONS
    tokens = scale.second_tokens
    found = []
    for corpus in corpora:
        streamed = [
            scale.run(_named(p, epsilon), corpus, scale.prefix(p, smoothing=epsilon), tokens=tokens)
            for p in scale.streams[:2]
            for epsilon in epsilons
        ]
        found += against(scale.run("control", corpus, scale.prefix(1), tokens=tokens), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Both halves of the claim are judged at each P and text."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        streamed = {name: run.streams for name, run in runs_of(of).items() if run.streams.streams > 1}
        for name, streams in streamed.items():
            seen = list(by_seed(of, name).values())
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                }
                | imbalance(seen)
                | {"largest that the head gives": statistics.mean(largest_given(row) for row in seen)}
                | {"skipped steps": sum(row["skipped_steps"] for row in seen)}
            )
            curves.setdefault(f"{corpus}, P={streams.streams}", []).append(
                (float(streams.smoothing), table[-1]["largest that the head gives"])
            )
        for p in dict.fromkeys(streams.streams for streams in streamed.values()):
            gain = paired(of, _named(p, 0.1), _named(p, 0))
            even = paired(of, _named(p, 0.1), _named(p, 0), largest_given, largest_given)
            outcomes.append(_both(gain.outcome, even.outcome))
            said.append(
                f"P={p} on {corpus}: loss {gain}, largest weight that the head gives lower by {even}, "
                f"{_boundary([row for row in of if row['of'].streams.streams == p])}"
            )
    reason = "ε = 0.1 against ε = 0: " + "; ".join(said) + "."
    return Verdict(outcomes, reason, table, curves, ("ε", "largest mean weight that the head gives"))


def _both(loss: Outcome, even: Outcome) -> Outcome:
    """The claim is of a lower loss and of even weights: where one of them is not there, it does not hold."""
    found: set[Outcome] = {loss, even}
    return "not supported" if "not supported" in found else combine(list(found))


def _named(streams: int, epsilon: float) -> str:
    return f"P={streams}, ε={epsilon:g}"


def _boundary(rows: Sequence[Row]) -> str:
    """From which ε on no run had a stream with nearly all the weight; rows of one P."""
    by_epsilon = {run.streams.smoothing: by_seed(rows, name).values() for name, run in runs_of(rows).items()}
    even = [not any(largest_given(row) > MONOCULTURE_WEIGHT for row in by_epsilon[e]) for e in sorted(by_epsilon)]
    if not even[-1]:
        return "no ε that was run keeps every seed from a monoculture"
    first = len(even) - even[::-1].index(False) if False in even else 0
    return f"no monoculture from ε = {sorted(by_epsilon)[first]:g} on"


CLAIM = Claim(
    "smoothing",
    "ε = 0.1 prevents load imbalance and ends at a lower loss than ε = 0.",
    "Imbalance without smoothing, and a lower loss with it (paper, section 3.2).",
    runs,
    verdict,
)
