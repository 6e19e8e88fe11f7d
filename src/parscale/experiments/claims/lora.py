"""Of what rank must the streams' LoRA be, and on which projections?"""

from collections.abc import Sequence
from typing import Any

from parscale.experiments.claim import Claim
from parscale.experiments.runs import SLOW, Run, Scale, against
from parscale.experiments.verdicts import (
    Row,
    Verdict,
    by_corpus,
    by_seed,
    imbalance,
    keeps,
    losses_of,
    mean_loss,
    outcome_of_share,
    paired,
    runs_of,
)

P = 4
FACTOR = 4
TARGETS = {"attention": ("q_proj", "k_proj", "v_proj"), "MLP": ("gate_proj", "up_proj")}
KEPT = 0.8
WHOLE, MORE, LESS = "rank × 1", f"rank × {FACTOR}", f"rank × {1 / FACTOR:g}"
ALIKE = "one stream as large as with"


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """From scratch, with the slow head of all such runs, and over a frozen backbone, beside one stream with a LoRA of
    as many parameters as theirs."""
    found = []
    for corpus in corpora:
        frozen: dict[str, Any] = {"stage": "frozen", "start": scale.base(corpus)}
        for place, more, head in (("from scratch", {}, SLOW), ("frozen", frozen, {})):
            streamed = [
                scale.run(f"{place}, {name}", corpus, scale.lora(P, **way), **more, **head, place=place, variant=name)
                for name, way in _ways(scale).items()
            ]
            alike = [
                scale.run(
                    f"{place}, {ALIKE} {name}",
                    corpus,
                    scale.lora(1, lora_rank=P * rank),
                    **more,
                    place=place,
                    variant=f"{ALIKE} {name}",
                )
                for name, rank in {WHOLE: scale.lora_rank, LESS: scale.lora_rank // FACTOR}.items()
                if rank > 0 and place == "frozen"
            ]
            found += against(scale.run(f"{place}, control", corpus, scale.prefix(1), **more), streamed + alike)
    return found


def _ways(scale: Scale) -> dict[str, dict[str, Any]]:
    rank = scale.lora_rank
    ways: dict[str, dict[str, Any]] = {WHOLE: {}, MORE: {"lora_rank": FACTOR * rank}}
    if rank >= FACTOR:
        ways[LESS] = {"lora_rank": rank // FACTOR}
    return ways | {f"{name} alone": {"lora_targets": targets} for name, targets in TARGETS.items()}


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where the scale's rank keeps 80 % of the gain of four times it. The others are told."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        for name, run in runs_of(of).items():
            if not run.variant:
                continue
            place, streams = run.place, run.streams
            control, seen = f"{place}, control", list(by_seed(of, name).values())
            gain, over = paired(of, name, control), paired(of, name, f"{place}, {ALIKE} {run.variant}")
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "rank": streams.lora_rank,
                    "projections": " ".join(streams.lora_targets) or "all",
                    "loss": mean_loss(seen),
                    "gain over control": str(gain),
                    "over one stream with as many LoRA parameters": str(over) if over.seeds else "",
                    "parameters of the streams": seen[0]["stream_parameters"],
                }
                | (imbalance(seen) if streams.streams > 1 else {})
            )
            if streams.streams > 1 and not streams.lora_targets and gain.seeds:
                curves.setdefault(f"{corpus}, {place}", []).append((float(streams.lora_rank), gain.mean))
        for place in ("from scratch", "frozen"):
            control, whole, more = (f"{place}, {name}" for name in ("control", WHOLE, MORE))
            kept = keeps(KEPT, *losses_of(of, whole, more, control))
            outcomes.append(outcome_of_share(kept, paired(of, more, control)))
            said.append(
                f"{place} on {corpus}: {WHOLE} gains {paired(of, whole, control)}, {MORE} {paired(of, more, control)}; "
                f"the first less {KEPT:.0%} of the second {kept}"
            )
    curves = {label: sorted(points) for label, points in curves.items()}
    return Verdict(outcomes, "; ".join(said) + ".", table, curves, ("rank", "gain over the control (nats)"))


CLAIM = Claim(
    "lora",
    f"A LoRA of rank 8 for each stream keeps {KEPT:.0%} of what one of rank 32 gains.",
    "Not in the paper, whose streams have a prefix alone. Of one LoRA it is known that a low rank is enough to adapt a "
    "trained model (arXiv 2106.09685, section 7.2), and that the place matters more than the rank (7.1).",
    runs,
    verdict,
)
