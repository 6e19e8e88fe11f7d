"""What is left of the gain when all streams attend to the keys and values of the first one?"""

from collections.abc import Sequence
from typing import Any

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
    names,
    outcome_of_share,
    paired,
)
from parscale.train.config import Stage

KV = ("own", "shared")
KEPT = 0.8
DECIDING = (4, 8)
"""The P at which the claim is decided."""
SECOND: tuple[Stage, ...] = ("retrofit", "frozen")
P_ELSEWHERE = 4
SIZES = 4
EQUAL = f"P=1, LoRA of {P_ELSEWHERE} streams"
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
        have = names(of)
        for name in (name for name in have if not name.endswith("control")):
            place, streams, keys = name.split(", ", 2)
            control, own = f"{place}, control", f"{place}, {streams}, {keys.replace('shared', 'own')}"
            if own not in have:  # what only shared keys can have stands beside own ones as they come
                own = f"{place}, {streams}, own"
            losses = losses_of(of, name, own, control)
            kept, seen = _kept(*losses), list(by_seed(of, name).values())
            over_equal = paired(of, name, f"{place}, {EQUAL}") if streams == f"P={P_ELSEWHERE}" else None
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
                | (imbalance(seen) if streams != "P=1" else {})
            )
            if streams == "P=1":
                continue
            points.setdefault(place, {})[name] = (f"{place}, {keys}", float(streams.removeprefix("P=")))
            if keys == "shared" and int(streams.removeprefix("P=")) in DECIDING:
                over = keeps(KEPT, *losses)
                outcomes.append(outcome_of_share(over, paired(of, own, control)))
                told = "not run" if not over.seeds else "no gain to keep" if kept is None else f"{kept:.0%} kept"
                said.append(f"{place}, {streams} on {corpus}: {told}; gain less {KEPT:.0%} of the own gain {over}")
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
            name = f"{place}, P={p}, {kv}" + (f", {other}" if other else "")
            found.append(scale.run(name, corpus, streams, **more))
    return found


def _equal(scale: Scale, place: str, corpus: str, **changes: Any) -> Run:
    return scale.run(f"{place}, {EQUAL}", corpus, scale.lora(1, lora_rank=P_ELSEWHERE * scale.lora_rank), **changes)


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
    place = f"pretrain, P={P_ELSEWHERE}"
    found = [
        scale.run(f"{place}, shared, {name}", corpus, scale.lora(P_ELSEWHERE, kv="shared", **changes), **SLOW)
        for name, changes in variants.items()
    ]
    ways: dict[str, Any] = {
        "prefix alone": ("prefix",),
        "prefix and vector": ("prefix", "embedding"),
        "prefix and scales": ("prefix", "rank1"),
    }
    for name, diversify in ways.items():
        for kv in KV:
            streams = scale.prefix(P_ELSEWHERE, diversify=diversify, kv=kv)
            found.append(scale.run(f"{place}, {kv}, {name}", corpus, streams, **SLOW))
    return found + _both(scale, "pretrain", corpus, (P_ELSEWHERE,), "no remedy")


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
