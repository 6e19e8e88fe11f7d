"""Do streams gain on a sparse model as on a dense one? (the paper's fourth open question)"""

from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against, remedy
from parscale.experiments.verdicts import Row, Verdict, by_corpus, growth, paired

SHAPES = {"smoke": ("pico", "2x32x2e8"), "cpu": ("pico", "2x32x2e8"), "gpu": ("6x384x6", "6x384x6e8")}
"""Dense and sparse, of equal active parameters."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """None at the paper's scale: it has no sparse models."""
    if scale.name not in SHAPES:
        return []
    found = []
    for corpus in corpora:
        for kind, model in zip(("dense", "sparse"), SHAPES[scale.name], strict=True):
            control = scale.run(f"{kind}, control", corpus, scale.prefix(1), model=model)
            streamed = [
                scale.run(f"{kind}, P={p}", corpus, scale.lora(p), model=model, **remedy(p)) for p in scale.streams[:2]
            ]
            found += against(control, streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where both gain; how far the gains differ is told, and decides nothing."""
    table, outcomes, said = [], [], []
    for corpus, of in by_corpus(rows).items():
        most = max(row["streams"] for row in of)
        for kind in ("dense", "sparse"):
            for p in sorted({row["streams"] for row in of} - {1}):
                gain = paired(of, f"{kind}, P={p}", f"{kind}, control")
                table.append({"text": corpus, "run": f"{kind}, P={p}", "gain over its control": str(gain)})
            gain = paired(of, f"{kind}, P={most}", f"{kind}, control")
            said.append(f"{kind}, P={most} on {corpus}: {gain}")
            outcomes.append(gain.outcome)
        dense, sparse = (f"dense, P={most}", "dense, control"), (f"sparse, P={most}", "sparse, control")
        said.append(f"sparse over dense: {growth(of, dense, sparse)}")
    return Verdict(outcomes, "; ".join(said) + ".", table)


CLAIM = Claim(
    "moe",
    "Streams gain on a mixture of experts too, beside a dense model of as many active parameters.",
    "Open. Experts add parameters without compute and streams add compute without parameters, so the gains may add up.",
    runs,
    verdict,
)
