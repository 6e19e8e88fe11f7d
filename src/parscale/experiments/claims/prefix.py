"""How long must a prefix be, how should it start, and is it still seen at the end of the context?

Every key that is added leaves all others a smaller share of attention. A prefix fades where it loses more than that:
its share is held against n/(n + t), what a gaze that favours no key would give it at place t.
"""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against, remedy
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, gain_of, paired, runs_of, streams_of

LENGTHS = (1, 3, 6, 12, 24, 48, 96)
STARTS = ("near_identity", "orthogonal", "text", "reparameterized")
SPREADS = (0.1, 3.0)
"""Of the start, times that of the layer's own keys and values."""
P = 4
FAR = "n=48, long context"
FROM_SCRATCH = "from scratch, "
WITH_LORA = ", with a LoRA"
PLAIN_START = "n=48"
DECIDING = ("n=48", "n=96")
"""With fewer tokens one of them may be where heads look that look nowhere."""
LONG = 8
"""Times the scale's context, with as many tokens a step."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """Stage 2, where a start can mean something: the base's attention is trained. Spread and right angles from scratch
    too, where streams have the time to part. Each start also beside a LoRA for each stream."""
    lengths, starts = (LENGTHS, STARTS) if scale.name != "smoke" else ((2, 8), STARTS[:2])
    found = []
    for corpus in corpora:
        common = {"stage": "retrofit", "start": scale.base(corpus)}
        for n in lengths:
            beside_lora = scale.name != "smoke" and f"n={n}" == PLAIN_START
            found += _measured(scale, f"n={n}", corpus, {"prefix_tokens": n}, common, beside_lora, at=n)
        if scale.name not in ("smoke", "paper"):
            longer = {"block_size": LONG * scale.block_size, "batch_size": max(1, scale.batch_size // LONG)}
            of_long = {"stage": "retrofit", "start": scale.base(corpus, **longer), **longer}
            found += _measured(scale, FAR, corpus, {}, of_long, beside_lora=False)
        for start in starts:
            beside_lora = scale.name not in ("smoke", "paper")
            found += _measured(scale, start, corpus, {"prefix_init": start}, common, beside_lora)
        if scale.name not in ("smoke", "paper"):
            for spread in SPREADS:
                named = f"spread × {spread:g}"
                found += _measured(scale, named, corpus, {"prefix_scale": spread}, common)
                found += _measured(scale, FROM_SCRATCH + named, corpus, {"prefix_scale": spread}, {})
            for start in ("normal", "orthogonal"):
                found += _measured(scale, FROM_SCRATCH + start, corpus, {"prefix_init": start}, {})
    return found


def _measured(
    scale: Scale,
    name: str,
    corpus: str,
    start: dict[str, Any],
    common: dict[str, Any],
    beside_lora: bool = True,
    at: float = 0.0,
) -> list[Run]:
    """P streams with such a prefix, alone and beside a LoRA each, and the one stream that both are held against. `at`
    puts the streams with a prefix alone on the curve."""
    control = scale.run(f"control, {name}", corpus, scale.prefix(1, **start), **common)
    alone = scale.run(name, corpus, scale.prefix(P, **start), **common, at=float(at))
    slow_head = {} if "stage" in common else remedy(P)
    with_lora = scale.run(name + WITH_LORA, corpus, scale.lora(P, **start), **common, **slow_head)
    return against(control, [alone, with_lora] if beside_lora else [alone])


def verdict(rows: Sequence[Row]) -> Verdict:
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        streamed = {name: run for name, run in runs_of(of).items() if run.control is not None}
        for name, run in streamed.items():
            seen = list(by_seed(of, name).values())
            gain = paired(of, name, run.control.name if run.control else "")
            bands = [statistics.mean(_share(row, i) for row in seen) for i in (0, -1)]
            over_even = [statistics.mean(_share(row, i) / _even(row, i) for row in seen) for i in (0, -1)]
            rho = [row["measured"]["rho_by_position"] for row in seen if row["measured"]["rho_by_position"]]
            table.append(
                {
                    "text": corpus,
                    "prefix": name,
                    "gain over its own control": str(gain),
                    "attention on it, first eighth": bands[0],
                    "last eighth": bands[1],
                    "over n/(n+t), first eighth": over_even[0],
                    "over n/(n+t), last eighth": over_even[1],
                    "ρ, first eighth": statistics.mean(r[0] for r in rho) if rho else None,
                    "ρ, last eighth": statistics.mean(r[-1] for r in rho) if rho else None,
                    "gain, first eighth": _gain_at(of, name, 0),
                    "gain, last eighth": _gain_at(of, name, -1),
                }
            )
            if run.at and gain.seeds:
                curves.setdefault(corpus, []).append((run.at, gain.mean))
        for name in (name for name in streamed if name in (*DECIDING, FAR)):
            seen = by_seed(of, name).values()
            fade = gain_of(
                [_share(row, -1) / _even(row, -1) for row in seen], [_share(r, 0) / _even(r, 0) for r in seen]
            )
            if name in DECIDING:
                outcomes.append(fade.outcome)
            said.append(f"{corpus}, {name}: {fade}")
    reason = (
        "Share of attention on the prefix over n/(n + t), first eighth of the context less the last: "
        + "; ".join(said)
        + "."
    )
    return Verdict(outcomes, reason, table, curves, ("prefix tokens n", "gain over the control of the same n"))


def _share(row: Row, band: int) -> float:
    """Of attention on the prefix, mean over the streams."""
    return statistics.mean(row["measured"]["prefix_attention_by_position"][band])


def _even(row: Row, band: int) -> float:
    """n/(n + t), mean over the places t of the band."""
    n = streams_of(row).prefix_tokens
    share = n / (n + 1 + np.arange(row["run"]["block_size"]))
    return float(np.array_split(share, len(row["measured"]["prefix_attention_by_position"]))[band].mean())


def _gain_at(rows: Sequence[Row], name: str, band: int) -> float | None:
    """Over the control at those places; None where it was not measured."""
    gains = [row["measured"].get("gain_by_position") for row in by_seed(rows, name).values()]
    return statistics.mean(gain[band] for gain in gains if gain) if any(gains) else None


CLAIM = Claim(
    "prefix",
    "The prefix fades: late in the context it loses more attention than the keys that are added take from all others.",
    "48 tokens (paper). A longer context leaves every key a smaller share; whether the prefix loses more than its "
    "part, and which start is best, is open.",
    runs,
    verdict,
)
