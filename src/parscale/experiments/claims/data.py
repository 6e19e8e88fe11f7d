"""Does the gain hold as the training tokens grow? (the paper's second open question)

The most streams are trained on the most tokens alone, for they cost the most; and with a slow head, which they need.
"""

from collections.abc import Sequence

import numpy as np

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, growth, names, paired

FACTORS = (0.125, 0.25, 0.5, 1.0)


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    step = scale.batch_size * scale.block_size
    found = []
    for corpus in corpora:
        for factor in FACTORS[2:] if scale.name == "smoke" else FACTORS:
            tokens = max(2, round(factor * scale.tokens / step)) * step
            name = f"{factor:g} × tokens"
            streamed = [scale.run(f"P={p}, {name}", corpus, scale.lora(p), tokens=tokens) for p in scale.streams[:2]]
            if factor == FACTORS[-1]:
                most = scale.streams[2:]
                streamed += [scale.run(f"P={p}, {name}", corpus, scale.lora(p), **SLOW) for p in most]
            control = scale.run(f"control, {name}", corpus, scale.prefix(1), tokens=tokens)
            found += against(control, streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the gain at the most tokens is not below that at the fewest. One stream on P times the tokens
    costs what P streams cost to train: a control of equal compute."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        for streams in dict.fromkeys(name.split(",")[0] for name in names(of) if name.startswith("P=")):
            by_factor: dict[float, tuple[str, str]] = {}
            for name in (name for name in names(of) if name.startswith(streams + ",")):
                control = name.replace(streams, "control", 1)
                factor = float(name.split(", ")[1].split()[0])
                by_factor[factor] = name, control
                gain = paired(of, name, control)
                as_long = f"control, {factor * int(streams.removeprefix('P=')):g} × tokens"
                table.append(
                    {
                        "text": corpus,
                        "run": name,
                        "gain over the control": str(gain),
                        "over one stream on P times the tokens": str(paired(of, name, as_long)),
                    }
                )
                curves.setdefault(f"{corpus}, {streams}", []).append((float(np.log2(factor)), gain.mean))
            if len(by_factor) == 1:
                continue
            change = growth(of, by_factor[min(by_factor)], by_factor[max(by_factor)])
            outcomes.append(change.outcome)
            said.append(f"{streams} on {corpus}: {change}")
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
