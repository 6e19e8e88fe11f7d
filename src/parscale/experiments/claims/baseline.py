"""From scratch: do P streams end below one stream, and below one stream with a prefix?"""

from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import PLAIN, Run, Scale, against, remedy
from parscale.experiments.verdicts import (
    Outcome,
    Row,
    Verdict,
    by_corpus,
    combine,
    gain_points,
    over_control,
    paired,
    runs_of,
)

PLAIN_ONE = "P=1, no prefix"
KINDS = ("prefix+lora", "prefix", "prefix, 0.5B")
"""What tells the streams apart. The first that was run decides: on small models a prefix alone hardly does."""
EQUAL = 4
"""One stream is given as many LoRA parameters as so many streams have."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    found = []
    for corpus in corpora:
        streamed = [scale.run(f"P={p}, prefix", corpus, scale.prefix(p), variant="prefix") for p in scale.streams]
        streamed += [
            scale.run(f"P={p}, prefix+lora", corpus, scale.lora(p), variant="prefix+lora", **remedy(p))
            for p in scale.streams
        ]
        one = [scale.run(PLAIN_ONE, corpus, PLAIN)]
        if scale.name != "paper":
            equal = scale.lora(1, lora_rank=EQUAL * scale.lora_rank)
            one.append(scale.run(f"P=1, prefix+lora of {EQUAL} streams", corpus, equal))
        else:
            streamed = [run for run in streamed if run.streams.diversify == ("prefix",)]
            streamed.append(scale.run("P=1, 0.5B", corpus, PLAIN, model="0.5B"))
            small = scale.run("P=2, prefix, 0.5B", corpus, scale.prefix(2), variant="prefix, 0.5B", model="0.5B")
            streamed.append(small)
        found += against(scale.run("control", corpus, scale.prefix(1)), [*one, *streamed])
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    streamed = {name: run for name, run in runs_of(rows).items() if run.streams.streams > 1}
    gains = {
        (corpus, name): paired(of, name, "control")
        for corpus, of in by_corpus(rows).items()
        for name in runs_of(of)
        if name in streamed
    }
    said = [f"{name} on {corpus}: {gain}" for (corpus, name), gain in gains.items()]
    of_kind: dict[str, list[Outcome]] = {
        kind: [gain.outcome for (_, name), gain in gains.items() if streamed[name].variant == kind] for kind in KINDS
    }
    said += [f"{kind}: {combine(found)}" for kind, found in of_kind.items() if found]
    places = {name: (run.variant, float(run.streams.streams)) for name, run in streamed.items()}
    deciding = next((found for found in of_kind.values() if found), [])
    table = over_control(rows)
    for line in table:
        of = [row for row in rows if row["corpus"] == line["text"]]
        line["gain over one stream without a prefix"] = (
            "" if line["run"] == PLAIN_ONE else str(paired(of, line["run"], PLAIN_ONE))
        )
    curves = gain_points(rows, places)
    return Verdict(deciding, "Gain over the control: " + "; ".join(said) + ".", table, curves, AXES)


AXES = ("P", "gain over the control (nats)")
CLAIM = Claim(
    "baseline",
    "Trained from scratch on the same tokens, P streams with a LoRA each end at a lower loss than one stream with a "
    "prefix.",
    "Lower, by more with more streams (paper, figure 1), there with a prefix each alone. On very small models that "
    "hardly tells streams apart; it is told beside, with a verdict of its own.",
    runs,
    verdict,
)
