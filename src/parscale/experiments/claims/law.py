"""Is loss a function of N and P as the paper's law has it?

N are the weights that all streams share. In the paper's models what streams have of their own is two thousandths of N
each; in the smallest ones here it is more than N, and a law of the sum would tell of that alone. It is told beside.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from parscale.errors import InputError
from parscale.experiments.claim import Claim
from parscale.experiments.runs import EVEN, MANY, SCALES, Run, Scale, against, remedy
from parscale.experiments.verdicts import SEEDS, WORTH, Row, Verdict, by_corpus, by_seed, names
from parscale.law.compare import compare
from parscale.law.fit import Law, bootstrap, fit
from parscale.law.forms import BILLION, SMALL

SIZES = 5
"""Fewer do not tell a law."""
LEAST = 5
"""Sizes and P together: the form has four coefficients."""
EVENLY = "load balance"
"""Many streams are also run with it in the slow head's place: is k of the method, or of what keeps them in use?"""
BY_WIDTH = "rate by width"
"""Models of another width than the scale's own are also run with the streams' rate inversely proportional to it, as the
backbone's is: is what larger models gain less by one of size, or of a rate that is too high for them?"""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    streams = (2, 4) if scale.name == "smoke" else (2, 4, 8)
    paper = scale.name == "paper"
    make = scale.prefix if paper else scale.lora
    found, evenly = [], []
    for corpus in corpora:
        for size in scale.sizes:
            control = scale.run(f"{size}, P=1", corpus, scale.prefix(1), model=size)
            more: Any = {"model": size, "control": control}
            found.append(control)
            for p in streams:
                found.append(scale.run(f"{size}, P={p}", corpus, make(p), **more, **({} if paper else remedy(p))))
                if p >= MANY and not paper:
                    evenly.append(
                        scale.run(f"{size}, P={p}, {EVENLY}", corpus, make(p), **more, **EVEN, variant=EVENLY)
                    )
            if size != scale.model and not paper:
                found += _by_width(scale, size, corpus, streams)
    return found + evenly


def _by_width(scale: Scale, size: str, corpus: str, streams: Sequence[int]) -> list[Run]:
    rate = scale.by_width(scale.stream_learning_rate, size)
    more: Any = {"model": size, "stream_learning_rate": rate, "variant": BY_WIDTH}
    streamed = [scale.run(f"{size}, P={p}, {BY_WIDTH}", corpus, scale.lora(p), **more, **remedy(p)) for p in streams]
    return against(scale.run(f"{size}, P=1, {BY_WIDTH}", corpus, scale.prefix(1), **more), streamed)


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where k's interval is above its bound, no rival form predicts runs that were left out better, and one
    without streams does worse; undecided where k may be nothing and may be worth something, and no form without
    streams does as well. The runs with a load balance are told beside, and decide nothing."""
    table, outcomes, said, curves = [], [], [], {}
    texts = {(corpus, kind): one for corpus, of in by_corpus(rows).items() for kind, one in by_remedy(of).items()}
    for (corpus, kind), of in texts.items():
        label = f"{corpus}, {kind}" if kind else corpus
        runs = law_runs(of)
        distinct = len({(run["size"], run["streams"]) for run in runs})
        if distinct < LEAST:
            said.append(f"{label}: {distinct} places of the grid were run, too few for a law.")
            if not kind:
                outcomes.append("undecided")
            continue
        for run in runs:
            curves.setdefault(f"{label}, P={run['streams']}", []).append((float(np.log10(run["params"])), run["loss"]))
        try:
            law, with_own = fit(runs), fit(law_runs(of, own=True))
            intervals, comparison = bootstrap(law, 200), compare(runs)
        except InputError as error:
            said.append(f"{label}: {error}.")
            if not kind:
                outcomes.append("undecided")
            continue
        low, high = intervals["k"]
        best = low > 2 * SMALL and "paper" in comparison.supported and "chinchilla" not in comparison.supported
        few = min(len(by_seed(of, name)) for name in names(of)) < SEEDS or len(np.unique(law.runs.size)) < SIZES
        # an interval down to the bound is no evidence against the law, unless one without streams does as well, or
        # not even the interval's upper end is a gain worth having
        doubt = low <= 2 * SMALL and "chinchilla" not in comparison.supported and _largest_gain(law, high) > WORTH
        if not kind:
            outcomes.append("undecided" if few or doubt else "supported" if best else "not supported")
        said.append(
            f"{label}: k = {law.k:.3f} [{low:.3f}, {high:.3f}], R² = {law.r2:.3f}; with the streams' own parameters "
            f"in N k = {with_own.k:.3f}. {comparison.verdict}"
        )
        for rival in comparison.rivals:
            table.append(
                {
                    "text": label,
                    "form": rival.law.form.name,
                    "formula": rival.law.form.formula,
                    "error on left-out runs": rival.by_run,
                    "on left-out sizes": rival.by_size,
                    "R²": rival.law.r2,
                    "coefficients": ", ".join(f"{k} = {v:.4g}" for k, v in rival.law.coefficients.items()),
                }
            )
    spent = (
        f" {sum(row['tokens'] for row in rows) / 1e6:.0f} M tokens in {sum(r['seconds'] for r in rows) / 3600:.1f} h."
    )
    return Verdict(outcomes, " ".join(said) + spent, table, curves, ("log10 N", "loss (nats)"), cloud=True)


def by_remedy(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs as they come; those where many streams have a load balance, with the few streams beside them; and those
    with a rate for each width, with the scale's own width beside them."""
    of = {variant: [row for row in rows if row["of"].variant == variant] for variant in ("", EVENLY, BY_WIDTH)}
    rest = of[""]
    found = {"": rest} if rest else {}
    if even := of[EVENLY]:
        sizes = {_size(row) for row in even}
        found[EVENLY] = [row for row in rest if row["streams"] < MANY and _size(row) in sizes] + even
    if by_width := of[BY_WIDTH]:
        found[BY_WIDTH] = [row for row in rest if _size(row) == SCALES[row["scale"]].model] + by_width
    return found


def law_runs(rows: Sequence[Row], own: bool = False) -> list[dict[str, Any]]:
    """Rows as `parscale.law.fit` takes them; `own`: with what the streams have of their own in N."""
    return [
        {
            "params": row["params"] - (0 if own else row["stream_parameters"]),
            "streams": row["streams"],
            "loss": row["validation_loss"],
            "seed": row["seed"],
            "size": _size(row),
        }
        for row in sorted(rows, key=lambda row: row["params"])
    ]


def _size(row: Row) -> str:
    return row["of"].model


def _largest_gain(law: Law, k: float) -> float:
    """What such a k would be worth to the run that it gains the most, nats."""
    reducible = (law.A * BILLION / law.runs.params) ** law.alpha
    return float(np.max(reducible * (1 - (1 + k * np.log(law.runs.streams)) ** -law.alpha)))


CLAIM = Claim(
    "law",
    "Loss follows L(N, P) = E + (A / (N·(k·ln P + 1)))^α: P streams are worth k·ln P + 1 times the parameters.",
    "k = 0.39 on code and 0.33 on the Pile (paper, table 3), at 0.5 to 4.4 B parameters, with a prefix each. Below "
    "nothing is known; here streams have a LoRA each as well, for models so small more than what they share.",
    runs,
    verdict,
    paper_texts=("code (Stack-V2-Python)", "web text (Pile)"),
)
