"""What is left of the gain when all streams attend to the keys and values of the first one?"""

from collections.abc import Sequence
from typing import Any

from parscale.config import StreamsConfig
from parscale.experiments.claim import Claim
from parscale.experiments.runs import EVEN, SLOW, Run, Scale, against, remedy
from parscale.experiments.verdicts import (
    Row,
    Verdict,
    by_corpus,
    by_seed,
    gain_points,
    imbalance,
    keeps,
    losses_of,
    mean_loss,
    outcome_of_share,
    paired,
    runs_of,
)
from parscale.train.config import Stage

KV = ("own", "shared")
KEPT = 0.8
DECIDING = (4, 8)
"""The P at which the claim is decided."""
SECOND: tuple[Stage, ...] = ("retrofit", "frozen")
P_ELSEWHERE = 4
SIZES = 4
AS_MANY = f"LoRA of {P_ELSEWHERE} streams"
"""One stream with the LoRA parameters of so many: what of their gain is no more than these?"""


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """Own keys and values and shared ones: from scratch and on a trained model at every P, at P = 4 for other sizes of
    both, and with another remedy or none."""
    found = []
    for corpus in corpora:
        control = scale.run("pretrain, control", corpus, scale.prefix(1))
        streamed = _both(scale, "pretrain", corpus, scale.streams) + _variants(scale, corpus)
        streamed += [_equal(scale, "pretrain", corpus)]
        streamed += _both(
            scale, "pretrain", corpus, [p for p in scale.streams if p in DECIDING], "load balance", **EVEN
        )
        found += against(control, streamed)
        base = scale.base(corpus)
        places: dict[str, dict[str, Any]] = {stage: {"stage": stage, "start": base} for stage in SECOND}
        for place, more in places.items():
            control = scale.run(f"{place}, control", corpus, scale.prefix(1), **more)
            streamed = [*_both(scale, place, corpus, scale.streams, **more), _equal(scale, place, corpus, **more)]
            streamed += _both(scale, place, corpus, (P_ELSEWHERE,), "slow head", **SLOW, **more)
            found += against(control, streamed)
        for place, more in _elsewhere(scale, corpus).items():
            control = scale.run(f"{place}, control", corpus, scale.prefix(1), **more)
            found += against(control, _both(scale, place, corpus, (P_ELSEWHERE,), **more))
    return list(dict.fromkeys(found))


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where, at P = 4 and 8, sharing keeps 80 % of what own keys and values gain."""
    table, outcomes, said, curves = [], [], [], {}
    points: dict[str, dict[str, tuple[str, float]]] = {}
    for corpus, of in by_corpus(rows).items():
        have = runs_of(of)
        for name, run in have.items():
            if run.control is None and run.variant != AS_MANY:
                continue
            place, p, keys = run.place, run.streams.streams, run.streams.kv
            control, own = f"{place}, control", _named(place, p, "own", run.variant)
            if own not in have:  # what only shared keys can have stands beside own ones as they come
                own = _named(place, p, "own")
            losses = losses_of(of, name, own, control)
            kept, seen = _kept(*losses), list(by_seed(of, name).values())
            over_equal = paired(of, name, _equal_named(place)) if p == P_ELSEWHERE else None
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                    "gain over control": str(paired(of, name, control)),
                    "over as many LoRA parameters": str(over_equal) if over_equal and over_equal.seeds else "",
                    "of the own gain": "" if name == own or kept is None else f"{kept:.0%}",
                }
                | (imbalance(seen) if p > 1 else {})
            )
            if p == 1:
                continue
            label = f"{keys}, {run.variant}" if run.variant else keys
            points.setdefault(place, {})[name] = (f"{place}, {label}", float(p))
            if keys == "shared" and not run.variant and p in DECIDING:
                over = keeps(KEPT, *losses)
                outcomes.append(outcome_of_share(over, paired(of, own, control)))
                told = "not run" if not over.seeds else "no gain to keep" if kept is None else f"{kept:.0%} kept"
                said.append(f"{place}, P={p} on {corpus}: {told}; gain less {KEPT:.0%} of the own gain {over}")
    for place, of_place in points.items():
        curves |= gain_points(rows, of_place, f"{place}, control")
    reason = "; ".join(said) or "No run with shared keys at P = 4 or 8"
    return Verdict(outcomes, f"{reason}.", table, curves, ("P", "gain over the control (nats)"))


def _elsewhere(scale: Scale, corpus: str) -> dict[str, dict[str, Any]]:
    """Other sizes: from scratch, and on a trained model of that size."""
    places: dict[str, dict[str, Any]] = {}
    for size in (size for size in scale.sizes[:SIZES] if size != scale.model):
        places[f"pretrain {size}"] = {"model": size}
        for stage in SECOND if scale.name != "smoke" else ():
            places[f"{stage} {size}"] = {"stage": stage, "start": scale.base(corpus, model=size), "model": size}
    return places


def _both(scale: Scale, place: str, corpus: str, counts: Sequence[int], other: str = "", **changes: Any) -> list[Run]:
    """With no other remedy named, many streams from scratch have a slow head: without one a head may pick one of them
    (claim `balance`), and what is left of no gain says nothing of sharing."""
    found = []
    for p in counts:
        more = changes | ({} if other or "stage" in changes else remedy(p))
        for kv in KV:
            streams = scale.lora(p, kv=kv)
            name = _named(place, p, kv, other)
            found.append(scale.run(name, corpus, streams, place=place, variant=other, **more))
    return found


def _equal(scale: Scale, place: str, corpus: str, **changes: Any) -> Run:
    as_many = scale.lora(1, lora_rank=P_ELSEWHERE * scale.lora_rank)
    return scale.run(_equal_named(place), corpus, as_many, place=place, variant=AS_MANY, **changes)


def _named(place: str, streams: int, kv: str, variant: str = "") -> str:
    return f"{place}, P={streams}, {kv}" + (f", {variant}" if variant else "")


def _equal_named(place: str) -> str:
    return f"{place}, P=1, {AS_MANY}"


def _variants(scale: Scale, corpus: str) -> list[Run]:
    """What the streams should have with shared keys: a prefix each (above), one for all, or none; whether the first
    stream may go without a LoRA; what may stand in a LoRA's place; and what the remedy is worth."""
    bare: Any = {"diversify": ("lora",), "prefix_tokens": 0}
    variants: dict[str, Any] = {
        "one prefix": {"shared_prefix": True},
        "no prefix": bare,
        "plain first": {"plain_first": True},
        "plain first, no prefix": bare | {"plain_first": True},
    }
    found = [
        _variant(scale, corpus, name, scale.lora(P_ELSEWHERE, kv="shared", **changes))
        for name, changes in variants.items()
    ]
    ways: dict[str, Any] = {
        "prefix alone": ("prefix",),
        "prefix and vector": ("prefix", "embedding"),
        "prefix and scales": ("prefix", "rank1"),
    }
    for name, diversify in ways.items():
        for kv in KV:
            found.append(_variant(scale, corpus, name, scale.prefix(P_ELSEWHERE, diversify=diversify, kv=kv)))
    return found + _both(scale, "pretrain", corpus, (P_ELSEWHERE,), "no remedy")


def _variant(scale: Scale, corpus: str, name: str, streams: StreamsConfig) -> Run:
    named = _named("pretrain", P_ELSEWHERE, streams.kv, name)
    return scale.run(named, corpus, streams, place="pretrain", variant=name, **SLOW)


def _kept(shared: Sequence[float], own: Sequence[float], control: Sequence[float]) -> float | None:
    """Mean gain of the shared run over that of the own one; None where no seed has all three, or where the own one
    gained nothing."""
    of_shared, gained = (sum(c - x for c, x in zip(control, of, strict=True)) for of in (shared, own))
    return of_shared / gained if gained > 0 else None


CLAIM = Claim(
    "sharing",
    "Streams that share the first one's keys and values keep 80 % of the gain.",
    "Not in the paper. Where a LoRA each tells the streams apart, sharing took a tenth to a fifth of the gain in "
    "earlier sweeps (docs/shared-kv.md).",
    runs,
    verdict,
)
