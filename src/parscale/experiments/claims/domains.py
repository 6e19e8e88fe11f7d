"""A frozen backbone and new streams for another domain: what is gained there, and what is forgotten at home?"""

import statistics
from collections.abc import Sequence

from parscale.config import StreamsConfig
from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against
from parscale.experiments.shapes import layers_and_width
from parscale.experiments.verdicts import Row, Verdict, by_corpus, by_seed, gain_of, mean_loss, names, paired
from parscale.train.prepare import FORGETTING

P = 4


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """The first text makes the backbone, the others are the domains."""
    if scale.name == "paper":
        return []
    home, *domains = corpora
    found = []
    for domain in domains:
        common = {"stage": "frozen", "start": scale.base(home), "forgetting": home}
        lora = StreamsConfig(1, 0, diversify=("lora",), lora_rank=equal_rank(scale))
        found += against(
            scale.run("control", domain, scale.prefix(1), **common),
            [
                scale.run(f"P={P}, prefix", domain, scale.prefix(P), **common),
                scale.run(f"P={P}, prefix+lora", domain, scale.lora(P), **common),
                scale.run("LoRA", domain, lora, **common),
            ],
        )
    return found


def equal_rank(scale: Scale) -> int:
    """The rank at which one LoRA has, as nearly as it can, the parameters of P streams with a prefix and a LoRA each:
    on the query, key, value, gate and up projections of the shape, with P prefixes and the aggregation head."""
    shape = layers_and_width(scale.model)
    assert shape is not None, "a scale that runs has a shape"
    layers, d = shape
    of_one_rank = layers * (6 * d + 2 * (d + 8 * d // 3 // 8 * 8))
    prefixes = 2 * layers * P * scale.prefix(P).prefix_tokens * d
    head = P * d * d + d + d * P + P
    return P * scale.lora_rank + round((prefixes + head) / of_one_rank)


def verdict(rows: Sequence[Row]) -> Verdict:
    table, outcomes, said = [], [], []
    for domain, of in by_corpus(rows).items():
        for name in names(of):
            seen = list(by_seed(of, name).values())
            home = [row["corpora"][FORGETTING]["after"] - row["corpora"][FORGETTING]["before"] for row in seen]
            table.append(
                {
                    "domain": domain,
                    "run": name,
                    "seeds": len(seen),
                    "loss": mean_loss(seen),
                    "before": statistics.mean(row["start_loss"] for row in seen),
                    "gain over control": "" if name == "control" else str(paired(of, name, "control")),
                    "loss at home rises by": str(gain_of([0.0] * len(home), home)),
                    "parameters": seen[0]["stream_parameters"],
                }
            )
        gain = paired(of, f"P={P}, prefix+lora", "LoRA")
        outcomes.append(gain.outcome)
        said.append(f"{domain}: {gain}")
    reason = f"P={P} with a LoRA each over one LoRA of as many parameters, on the domain: " + "; ".join(said) + "."
    return Verdict(outcomes, reason, table)


CLAIM = Claim(
    "domains",
    "On a frozen backbone, streams adapt to another domain better than one LoRA of as many parameters.",
    "The paper freezes a code-trained backbone and gains on code (section 4.2). With streams switched off the backbone "
    "is the old one; with them on, what it does at home may change.",
    runs,
    verdict,
    corpora=2,
)
