"""How long must a prefix be, how should it start, and is it still seen at the end of the context?"""

import statistics
from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, combine, gain_of, names, paired

LENGTHS = (1, 3, 6, 12, 24, 48, 96)
STARTS = ("near_identity", "orthogonal", "text", "reparameterized")
P = 4


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """Stage 2, where a start can mean something: the base's attention is trained."""
    lengths, starts = (LENGTHS, STARTS) if scale.name != "smoke" else ((2, 8), STARTS[:2])
    found = []
    for corpus in corpora:
        common = {"stage": "retrofit", "start": scale.base(corpus)}
        for n in lengths:
            control = scale.run(f"control, n={n}", corpus, scale.prefix(1, prefix_tokens=n), **common)
            found += against(control, [scale.run(f"n={n}", corpus, scale.prefix(P, prefix_tokens=n), **common)])
        for start in starts:
            control = scale.run(f"control, {start}", corpus, scale.prefix(1, prefix_init=start), **common)
            found += against(control, [scale.run(start, corpus, scale.prefix(P, prefix_init=start), **common)])
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        streamed = [name for name in names(of) if not name.startswith("control")]
        for name in streamed:
            seen = list(by_seed(of, name).values())
            gain = paired(of, name, f"control, {name}")
            bands = [
                statistics.mean(statistics.mean(row["measured"]["prefix_attention_by_position"][i]) for row in seen)
                for i in (0, -1)
            ]
            rho = [row["measured"]["rho_by_position"] for row in seen if row["measured"]["rho_by_position"]]
            table.append(
                {
                    "text": corpus,
                    "prefix": name,
                    "gain over its own control": str(gain),
                    "attention on it, first eighth": bands[0],
                    "last eighth": bands[1],
                    "ρ, first eighth": statistics.mean(r[0] for r in rho) if rho else None,
                    "ρ, last eighth": statistics.mean(r[-1] for r in rho) if rho else None,
                }
            )
            if name.startswith("n=") and gain.seeds:
                curves.setdefault(corpus, []).append((float(name[2:]), gain.mean))
        lengths = [name for name in streamed if name.startswith("n=")]
        if not lengths:
            continue
        longest = by_seed(of, lengths[-1])
        bands_of = {seed: row["measured"]["prefix_attention_by_position"] for seed, row in longest.items()}
        fade = gain_of(
            [statistics.mean(b[-1]) for b in bands_of.values()], [statistics.mean(b[0]) for b in bands_of.values()]
        )
        outcomes.append(fade.outcome)
        said.append(f"{corpus}, {lengths[-1]}: {fade}")
    reason = "Share of attention on the prefix, first eighth of the context less the last: " + "; ".join(said) + "."
    return Verdict(combine(outcomes), reason, table, curves, ("prefix tokens n", "gain over the control of the same n"))


CLAIM = Claim(
    "prefix",
    "The prefix fades: late in the context it gets less attention than at its start.",
    "48 tokens (paper). Longer contexts leave it a smaller share; which start is best is open.",
    runs,
    verdict,
)
