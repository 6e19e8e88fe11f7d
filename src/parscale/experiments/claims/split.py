"""How to divide the compute between a plain stage 1 and a stage 2 with streams (the paper's third open question)."""

from collections.abc import Sequence
from typing import Any

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import (
    Row,
    Verdict,
    by_corpus,
    by_seed,
    gain_of,
    keeps,
    losses_of,
    mean_loss,
    outcome_of_share,
    over_another,
    over_control,
    runs_of,
)

P = 4
KEPT = 0.953
COMPUTE, TOKENS = "equal compute", "equal tokens"
SHARES = (0.1, 0.25, 0.5, 0.75)
"""Of the compute in stage 2."""
OF_TOKENS = (0.02, 0.1, 0.25)
"""Of the tokens in stage 2, where the tokens are as many as in a run from scratch; the paper's is the first."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """Equal compute: tokens of stage 1, and P times those of stage 2, sum to P times the scale's tokens."""
    step = scale.batch_size * scale.block_size
    found = []
    for corpus in corpora:
        whole = P * scale.tokens // step
        as_long = scale.run("control, tokens of share 1", corpus, scale.prefix(1))
        found += against(as_long, [scale.run("share 1", corpus, scale.lora(P), **SLOW, place=COMPUTE, at=1.0)])
        control = scale.run("control", corpus, scale.prefix(1), tokens=whole * step)
        streamed = []
        for share in SHARES[1:3] if scale.name == "smoke" else SHARES:
            second = max(1, round(share * whole / P))
            base = scale.base(corpus, tokens=(whole - P * second) * step)
            streamed.append(
                scale.run(
                    f"share {share:g}",
                    corpus,
                    scale.lora(P),
                    tokens=second * step,
                    stage="retrofit",
                    start=base,
                    place=COMPUTE,
                    at=share,
                )
            )
        found += against(control, streamed)
        for share in OF_TOKENS[-1:] if scale.name == "smoke" else OF_TOKENS:
            second = max(1, round(share * scale.tokens / step))
            place: Any = {"stage": "retrofit", "tokens": second * step, "place": TOKENS}
            place["start"] = scale.base(corpus, tokens=scale.tokens - second * step)
            name = f"{share:g} of the tokens"
            control = scale.run(f"control, {name}", corpus, scale.prefix(1), **place)
            found += against(control, [scale.run(name, corpus, scale.lora(P), **place, at=share)])
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the least share of the tokens in stage 2 keeps at least 95.3 % of the from-scratch gain, each
    over one stream trained alike; equal compute is told beside."""
    outcomes, said, curves = [], [], {}
    for corpus, of in by_corpus(rows).items():
        for name, share in _shares(of, COMPUTE).items():
            curves.setdefault(corpus, []).append((share, mean_loss(by_seed(of, name).values())))
        shares = [x for x, _ in curves.get(corpus, []) if x < 1]
        if not shares:
            continue
        of_least, of_whole, of_control = losses_of(of, f"share {min(shares):g}", "share 1", "control")
        gained = gain_of(of_whole, of_control)
        kept = gain_of(of_least, of_control).mean
        said.append(
            f"{corpus}: with {min(shares):.0%} of the compute in stage 2, gain {kept:+.4f} of {gained} from scratch"
            if gained.seeds
            else f"{corpus}: not run"
        )
    for corpus, of in by_corpus(rows).items():
        whole, of_whole = "share 1", "control, tokens of share 1"
        for name, share in _shares(of, TOKENS).items():
            ours, alone, most, alone_too = losses_of(of, name, f"control, {name}", whole, of_whole)
            kept = keeps(KEPT, over_another(ours, alone, alone_too), most, alone_too)
            gain, gained = gain_of(ours, alone), gain_of(most, alone_too)
            part = "" if not kept.seeds else f" ({gain.mean / gained.mean:.0%} of it)"
            said.append(
                f"{corpus}, at equal tokens, {share:.0%} of them in stage 2: gain {gain} of {gained} from scratch{part}"
            )
            if share == OF_TOKENS[0]:
                outcomes.append(outcome_of_share(kept, gained))
    axes = ("share of the compute in stage 2", "loss (nats)")
    reason = "Over one stream with the same compute, or the same tokens. " + "; ".join(said) + "."
    return Verdict(outcomes, reason, over_control(rows), curves, axes)


def _shares(rows: Sequence[Row], place: str) -> dict[str, float]:
    """The runs with streams of a place, by their share in stage 2, ascending."""
    found = {name: run.at for name, run in runs_of(rows).items() if run.place == place and run.streams.streams > 1}
    return dict(sorted(found.items(), key=lambda entry: entry[1]))


CLAIM = Claim(
    "split",
    "A short stage 2 keeps the gain: 2 % of the tokens with streams give 95.3 % of the gain of streams from the first "
    "token.",
    "95.3 % of the performance (paper, stage 2 of 20 B tokens behind 1 T); the best share is open. At equal compute "
    "the control sees P times the tokens.",
    runs,
    verdict,
)
