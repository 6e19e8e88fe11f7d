"""Does the gain hold as the training tokens grow? (the paper's second open question)

The most streams are trained on the most tokens alone, for they cost the most; and with a slow head, which they need.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, growth, paired, runs_of

FACTORS = (0.125, 0.25, 0.5, 1.0)


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    step = scale.batch_size * scale.block_size
    found = []
    for corpus in corpora:
        for factor in FACTORS[2:] if scale.name == "smoke" else FACTORS:
            tokens = max(2, round(factor * scale.tokens / step)) * step
            name = f"{factor:g} × tokens"
            rates: dict[int, dict[str, Any]] = {p: {"tokens": tokens} for p in scale.streams[:2]}
            if factor == FACTORS[-1]:
                rates |= dict.fromkeys(scale.streams[2:], SLOW)
            streamed = [
                scale.run(f"P={p}, {name}", corpus, scale.lora(p), at=factor, **rate) for p, rate in rates.items()
            ]
            control = scale.run(f"control, {name}", corpus, scale.prefix(1), tokens=tokens)
            found += against(control, streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the gain at the most tokens is not below that at the fewest. One stream on P times the tokens
    costs what P streams cost to train: a control of equal compute."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        streamed = {name: run for name, run in runs_of(of).items() if run.control is not None}
        for p in dict.fromkeys(run.streams.streams for run in streamed.values()):
            by_factor: dict[float, tuple[str, str]] = {}
            for name, run in streamed.items():
                if run.streams.streams != p or run.control is None:
                    continue
                by_factor[run.at] = name, run.control.name
                gain = paired(of, name, run.control.name)
                as_long = f"control, {run.at * p:g} × tokens"
                table.append(
                    {
                        "text": corpus,
                        "run": name,
                        "gain over the control": str(gain),
                        "over one stream on P times the tokens": str(paired(of, name, as_long)),
                    }
                )
                curves.setdefault(f"{corpus}, P={p}", []).append((float(np.log2(run.at)), gain.mean))
            if len(by_factor) == 1:
                continue
            change = growth(of, by_factor[min(by_factor)], by_factor[max(by_factor)])
            outcomes.append(change.outcome)
            said.append(f"P={p} on {corpus}: {change}")
    reason = "Gain at the most tokens less that at the fewest: " + "; ".join(said) + "."
    axes = ("log2 of the tokens over the scale's", "gain over the control (nats)")
    return Verdict(outcomes, reason, table, curves, axes)


CLAIM = Claim(
    "data",
    "The gain of P streams grows with the training tokens.",
    "Open. The paper's two data sets have 42 B tokens each, and its 1 T run gains more on code and mathematics.",
    runs,
    verdict,
)
