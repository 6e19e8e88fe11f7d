"""Beyond 8 streams: does the gain go on, level off, or turn? (the paper's first open question)"""

from collections.abc import Sequence
from itertools import pairwise

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against, remedy
from parscale.experiments.verdicts import (
    Row,
    Verdict,
    by_corpus,
    gain_points,
    growth,
    over_control,
    paired,
    runs_of,
)

COUNTS = (2, 4, 8, 16, 32)


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    counts = (2, 4, 8) if scale.name == "smoke" else COUNTS
    found = []
    for corpus in corpora:
        streamed = [scale.run(f"P={p}", corpus, scale.lora(p), **remedy(p)) for p in counts]
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    outcomes, said = [], []
    for corpus, of in by_corpus(rows).items():
        counts = sorted(p for run in runs_of(of).values() if (p := run.streams.streams) > 1)
        for fewer, more in pairwise(counts):
            step = paired(of, f"P={more}", f"P={fewer}")
            said.append(f"{fewer} → {more} on {corpus}: {step}")
            if fewer >= 8:
                outcomes.append(step.outcome)
        doublings = [(f"P={more}", f"P={fewer}") for fewer, more in pairwise(counts)]
        if len(doublings) > 1:
            said.append(f"the last less the first on {corpus}: {growth(of, doublings[0], doublings[-1])}")
    reason = "Gain of each doubling: " + "; ".join(said) + "."
    streamed = {name: run.streams.streams for name, run in runs_of(rows).items() if run.streams.streams > 1}
    places = {name: ("prefix+lora", float(p)) for name, p in streamed.items()}
    axes = ("P", "gain over the control (nats)")
    return Verdict(outcomes or ["undecided"], reason, over_control(rows), gain_points(rows, places), axes)


CLAIM = Claim(
    "many-streams",
    "The gain goes on beyond P = 8: 16 streams beat 8, and 32 beat 16.",
    "Open. A logarithm would give every doubling the same gain, so that the last less the first is nothing; below that "
    "the gain levels off. Each stream here has a LoRA of its own as well.",
    runs,
    verdict,
)
