"""What should tell the streams apart: the paper's prefix alone, or more than that?"""

import statistics
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
    mean_loss,
    names,
    paired,
)

P = 4
PREFIX = f"P={P}, prefix"
LORA = f"P={P}, prefix+lora"
NO_PREFIX: dict[str, Any] = {"diversify": ("lora",), "prefix_tokens": 0}


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """All with a slow head: whether a head picks one stream early is another question (claim `balance`)."""
    found = []
    for corpus in corpora:
        ways = {
            PREFIX: scale.prefix(P),
            f"P={P}, prefix+embedding": scale.prefix(P, diversify=("prefix", "embedding")),
            f"P={P}, prefix+rank1": scale.prefix(P, diversify=("prefix", "rank1")),
            LORA: scale.lora(P),
            f"P={P}, lora": scale.lora(P, **NO_PREFIX),
        }
        streamed = [scale.run(name, corpus, streams, **SLOW) for name, streams in ways.items()]
        found += against(scale.run("control", corpus, scale.prefix(1)), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where a LoRA each beats the prefix alone. The others are told: the best of many, picked by the loss
    that it is judged by, would beat it by luck."""
    table, outcomes, said = [], [], []
    for corpus, of in by_corpus(rows).items():
        for name in (name for name in names(of) if name != "control"):
            seen = list(by_seed(of, name).values())
            gain = paired(of, name, PREFIX)
            table.append(
                {
                    "text": corpus,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                    "gain over control": str(paired(of, name, "control")),
                    "gain over the prefix alone": "" if name == PREFIX else str(gain),
                    "parameters of the streams": seen[0]["stream_parameters"],
                    "cosine": statistics.mean(row["measured"]["cosine"] for row in seen),
                }
                | imbalance(seen)
            )
            if name == LORA:
                outcomes.append(gain.outcome)
                said.append(f"on {corpus}: {LORA} over the prefix alone {gain}")
    return Verdict(outcomes, "; ".join(said) + ".", table)


CLAIM = Claim(
    "diversifiers",
    "Streams that are told apart by a LoRA each beside the paper's prefix end at a lower loss.",
    "Not in the paper. Prefixes alone separate the streams slowly; a LoRA each gives them something to differ in.",
    runs,
    verdict,
)
