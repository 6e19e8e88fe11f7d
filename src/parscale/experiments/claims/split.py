"""How to divide the compute between a plain stage 1 and a stage 2 with streams (the paper's third open question)."""

from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import (
    Row,
    Verdict,
    by_corpus,
    by_seed,
    combine,
    gain_of,
    keeps,
    losses_of,
    mean_loss,
    names,
    outcome_of_share,
    over_control,
)

P = 4
KEPT = 0.953
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of the compute in stage 2."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """Equal compute: tokens of stage 1, and P times those of stage 2, sum to P times the scale's tokens."""
    step = scale.batch_size * scale.block_size
    found = []
    for corpus in corpora:
        whole = P * scale.tokens // step
        as_long = scale.run("control, tokens of share 1", corpus, scale.prefix(1))
        found += against(as_long, [scale.run("share 1", corpus, scale.lora(P), **SLOW)])
        control = scale.run("control", corpus, scale.prefix(1), tokens=whole * step)
        streamed = []
        for share in SHARES[1:3] if scale.name == "smoke" else SHARES:
            second = max(1, round(share * whole / P))
            base = scale.base(corpus, tokens=(whole - P * second) * step)
            streamed.append(
                scale.run(f"share {share:g}", corpus, scale.lora(P), tokens=second * step, stage="retrofit", start=base)
            )
        found += against(control, streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the least share of compute in stage 2 keeps at least 95.3 % of the from-scratch gain."""
    outcomes, said, curves = [], [], {}
    for corpus, of in by_corpus(rows).items():
        for name in sorted((n for n in names(of) if n.startswith("share")), key=lambda n: float(n.split()[1])):
            curves.setdefault(corpus, []).append((float(name.split()[1]), mean_loss(by_seed(of, name).values())))
        shares = [x for x, _ in curves.get(corpus, []) if x < 1]
        if not shares:
            continue
        of_least, of_whole, of_control = losses_of(of, f"share {min(shares):g}", "share 1", "control")
        gained = gain_of(of_whole, of_control)
        outcomes.append(outcome_of_share(keeps(KEPT, of_least, of_whole, of_control), gained))
        kept = gain_of(of_least, of_control).mean
        said.append(
            f"{corpus}: with {min(shares):.0%} of the compute in stage 2, gain {kept:+.4f} of {gained} from scratch"
            if gained.seeds
            else f"{corpus}: not run"
        )
    axes = ("share of the compute in stage 2", "loss (nats)")
    reason = "Over one stream with the same compute. " + "; ".join(said) + "."
    return Verdict(combine(outcomes), reason, over_control(rows), curves, axes)


CLAIM = Claim(
    "split",
    "A short stage 2 keeps the gain: at equal compute, little of it spent with streams gives 95.3 % of the gain of "
    "streams from the first token.",
    "The paper's stage 2 has 2 % of the tokens; the best share is open. Equal compute means that the control sees P "
    "times the tokens.",
    runs,
    verdict,
)
