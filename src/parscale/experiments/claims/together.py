"""Do streams gain where models and their tokens grow together?

On the same tokens a wide model gains less than a narrow one (claim `law`): is that its size, or are its tokens few?
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against, remedy
from parscale.experiments.shapes import layers_and_width
from parscale.experiments.verdicts import Row, Verdict, by_corpus, growth, over_control, paired, runs_of

P = 4
_SIZED = " × size and tokens"


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """The law's sizes, from scratch, each on tokens in proportion to its layers · width²."""
    if scale.name == "paper":
        return []
    found, step = [], scale.batch_size * scale.block_size
    for corpus in corpora:
        for size in scale.sizes:
            factor = _weights(size) / _weights(scale.model)
            tokens = max(2, round(factor * scale.tokens / step)) * step
            sized = f"{factor:.3g}{_SIZED}"
            place: Any = {"model": size, "tokens": tokens, "at": float(f"{factor:.3g}")}
            control = scale.run(f"control, {sized}", corpus, scale.prefix(1), **place)
            streams = scale.run(f"P={P}, {sized}", corpus, scale.lora(P), **place, **remedy(P))
            found += against(control, [streams])
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    """Supported where streams gain at every size; by how much more or less at the largest is told beside."""
    table, outcomes, said, curves = [], [], [], {}
    for corpus, of in by_corpus(rows).items():
        sizes = sorted({(run.at, name) for name, run in runs_of(of).items() if run.control is None})
        for factor, control in sizes:
            streams = _streamed(factor)
            table += over_control([row for row in of if row["name"] in (control, streams)], control)
            gain = paired(of, streams, control)
            outcomes.append(gain.outcome)
            said.append(f"{factor:g}{_SIZED} on {corpus}: {gain}")
            if gain.seeds:
                curves.setdefault(corpus, []).append((float(np.log2(factor)), gain.mean))
        smallest, largest = ((_streamed(factor), control) for factor, control in (sizes[0], sizes[-1]))
        said.append(f"the largest model's gain less the smallest one's on {corpus}: {growth(of, smallest, largest)}")
    axes = ("log2 of size and tokens over the scale's", "gain over the control (nats)")
    return Verdict(outcomes, "; ".join(said) + ".", table, curves, axes)


def _weights(model: str) -> int:
    """Layers · width², which the weights beside the embeddings are in proportion to."""
    shape = layers_and_width(model)
    assert shape is not None, "a scale that runs has shapes"
    return shape[0] * shape[1] ** 2


def _streamed(factor: float) -> str:
    return f"P={P}, {factor:.3g}{_SIZED}"


CLAIM = Claim(
    "together",
    f"P={P} streams gain at every size where tokens grow with the model.",
    "The paper's models of 0.5 to 4.4 B all have the same 42 B tokens, and there k rises with size. On the same few "
    "tokens the smallest models gain the most here (claim law).",
    runs,
    verdict,
)
