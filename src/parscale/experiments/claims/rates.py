"""Does the gain hang on the learning rates of the head, and of what the streams have of their own?"""

from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import (
    Row,
    Verdict,
    by_corpus,
    by_seed,
    imbalance,
    keeps,
    losses_of,
    mean_loss,
    outcome_of_share,
    over_another,
    paired,
    runs_of,
)

P = 4
HEADS = (0.01, 0.03, 0.1, 0.3, 1.0)
"""Shares of the backbone's rate."""
STREAMS = (0.25, 0.5, 2.0)
"""Shares of the scale's own rate, which the runs of the head have."""
HEAD, STREAMS_RATE, PREFIX_ALONE = "head", "streams", "stage 2, prefix alone"
"""Whose rate it is that runs differ in."""
CHOSEN = "head at 0.1"
CONTROL = "control"
NEAR = ("head at 0.03", "head at 0.3", "streams at 0.5", "streams at 2")
"""Within a factor of three of what runs from scratch have."""
KEPT = 0.5


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """The streams' rate is the control's prefix's too: each has a control of its own."""
    heads, factors = (HEADS, STREAMS) if scale.name != "smoke" else ((0.1, 1.0), (2.0,))
    found = []
    for corpus in corpora:
        ways = [
            scale.run(f"{HEAD} at {rate:g}", corpus, scale.lora(P), head_rate=rate, variant=HEAD, at=rate)
            for rate in heads
        ]
        found += against(scale.run(CONTROL, corpus, scale.prefix(1)), ways)
        for factor in factors:
            rate = {"stream_learning_rate": factor * scale.stream_learning_rate}
            name = f"{STREAMS_RATE} at {factor:g}"
            control = scale.run(f"control, {name}", corpus, scale.prefix(1), **rate)
            rate |= {"variant": STREAMS_RATE, "at": factor}
            found += against(control, [scale.run(name, corpus, scale.lora(P), **SLOW, **rate)])
        if scale.name not in ("smoke", "paper"):
            found += _prefix_alone(scale, corpus)
    return found


def _prefix_alone(scale: Scale, corpus: str) -> list[Run]:
    """Its rate without a LoRA's, in stage 2, where the backbone has its own by then."""
    found = []
    for factor in (*STREAMS, 1.0):
        common = {
            "stage": "retrofit",
            "start": scale.base(corpus),
            "stream_learning_rate": factor * scale.stream_learning_rate,
        }
        name = f"{PREFIX_ALONE} at {factor:g}"
        control = scale.run(f"control, {name}", corpus, scale.prefix(1), **common)
        streamed = scale.run(name, corpus, scale.prefix(P), variant=PREFIX_ALONE, at=factor, **common)
        found += against(control, [streamed])
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where every rate within a factor of three keeps half of the gain of the chosen ones."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        whole = paired(of, CHOSEN, CONTROL)
        said.append(f"on {corpus} {CHOSEN}, streams at 1 {whole}")
        for name, run in runs_of(of).items():
            if run.control is None:
                continue
            control = run.control.name
            gain, seen = paired(of, name, control), list(by_seed(of, name).values())
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                    "loss of its control": mean_loss(by_seed(of, control).values()) if gain.seeds else None,
                    "gain over its control": str(gain),
                }
                | imbalance(seen)
            )
            if gain.seeds == 0:
                continue
            curves.setdefault(f"{corpus}, {run.variant}", []).append((run.at, gain.mean))
            if name == CHOSEN:
                curves.setdefault(f"{corpus}, {STREAMS_RATE}", []).append((1.0, gain.mean))
            if name in NEAR:
                ran, of_ran, best, of_best = losses_of(of, name, control, CHOSEN, CONTROL)
                level = over_another(ran, of_ran, of_best)
                outcomes.append(outcome_of_share(keeps(KEPT, level, best, of_best), whole))
                said.append(f"{name} {gain}")
    reason = "Gains over one stream at the same rate: " + "; ".join(said) + "."
    return Verdict(outcomes, reason, table, {k: sorted(v) for k, v in curves.items()}, AXES)


AXES = ("rate, as a share", "gain over its control (nats)")
CLAIM = Claim(
    "rates",
    "The gain does not hang on one learning rate: a third or three times the head's, and half or twice the streams', "
    "keep half of it.",
    "Not in the paper. A head at a tenth of the backbone's rate lets the streams differ before it picks; how finely it "
    "must be tuned is open.",
    runs,
    verdict,
)
