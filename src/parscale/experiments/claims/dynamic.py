"""Can one checkpoint be run at any p up to P?"""

import statistics
from collections.abc import Sequence
from typing import Any

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, mean_loss, paired, runs_of
from parscale.train.config import Balance

MANY = 4
ADAPTER = "adapter"
"""Of one frozen backbone: `sharing` has the same runs."""
RANDOM = "trained at random p"
TRAINED_FOR_IT = (f"{RANDOM}, slow head", RANDOM)
"""The claim is of those. The first that was run decides: so many streams have a slow head wherever they are trained
from scratch."""
RANDOM_P = Balance(fewer_streams=0.5)
KEYS: dict[str, dict[str, Any]] = {"": {}, ", shared keys": {"kv": "shared"}}
"""With shared ones p may change from token to token, by a schedule (docs/shared-kv.md)."""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    found = []
    for corpus in corpora:
        control = scale.run("control", corpus, scale.lora(1))
        few = [scale.run(f"trained at P={p}", corpus, scale.lora(p)) for p in (2, MANY)]
        any_p = [
            scale.run(f"{RANDOM}{keys}{head}", corpus, scale.lora(MANY, **kv), balance=RANDOM_P, **rate)
            for keys, kv in KEYS.items()
            for head, rate in {"": {}, ", slow head": SLOW}.items()
        ]
        found += against(control, any_p)
        of_baseline = scale.run("control, prefix alone", corpus, scale.prefix(1))  # so that these are not run again
        found += against(of_baseline, few)
        place: dict[str, Any] = {"stage": "frozen", "start": scale.base(corpus)}
        place["place"] = ADAPTER
        adapters = [scale.run(f"{ADAPTER} P={p}", corpus, scale.lora(p), **place) for p in scale.streams]
        found += against(scale.run(f"control, {ADAPTER}", corpus, scale.prefix(1), **place), adapters)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """The claim holds where two of four streams are not worse than one stream trained alone."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        streamed = {name: run for name, run in runs_of(of).items() if run.streams.streams > 1}
        checkpoints = [name for name, run in streamed.items() if run.place != ADAPTER]
        if not checkpoints:
            continue
        for name in checkpoints:
            seen = by_seed(of, name)
            at = {p: [_at(row, p) for row in seen.values()] for p in next(iter(seen.values()))["measured"]["at"]}
            table.append({"text": corpus, "checkpoint": name} | _filled({p: statistics.mean(v) for p, v in at.items()}))
            at_2 = paired(of, name, "control", lambda row: _at(row, "2"))
            of_control = mean_loss(by_seed(of, "control").values()) if at_2.seeds else None
            table[-1] |= {"control": of_control, "gain at p=2": str(at_2)}
            curves[f"{corpus}, {name}"] = [(float(p), statistics.mean(values)) for p, values in at.items()]
        at_2s = {
            name: paired(of, name, "control", lambda row: _at(row, "2"))
            for name in ("trained at P=4", *TRAINED_FOR_IT, f"{RANDOM}, shared keys")
        }
        said += [f"{name}, run at p=2, over one stream trained alone, on {corpus}: {at_2s[name]}" for name in at_2s]
        outcomes.append(next((at_2s[n].outcome for n in TRAINED_FOR_IT if at_2s[n].seeds), "not run"))
        for name in (name for name, run in streamed.items() if run.place == ADAPTER):
            said.append(
                f"{name} over one stream's on the same frozen backbone, on {corpus}: "
                f"{paired(of, name, f'control, {ADAPTER}')}"
            )
    return Verdict(outcomes, "; ".join(said) + ".", table, curves, ("p at inference", "loss (nats)"))


def _at(row: Row, p: str) -> float:
    """The loss with the first p streams, on the text of the row's validation loss: what p streams lose or gain is
    measured on a part of it."""
    measured = row["measured"]
    return row["validation_loss"] + measured["at"][p] - measured["merged"]


def _filled(losses: dict[str, float]) -> dict[str, float | None]:
    return {f"p={p}": losses.get(str(p)) for p in (1, 2, MANY)}


CLAIM = Claim(
    "dynamic",
    "A checkpoint trained with a random number of streams is better than one stream when run with fewer than P.",
    "The paper trains for one P at a time and switches prefixes between them; a checkpoint that was always trained "
    "with all streams may not bear their absence, one trained at random p should.",
    runs,
    verdict,
)
