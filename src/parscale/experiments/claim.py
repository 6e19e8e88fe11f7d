"""What an experiment is: one claim, what is expected of it, what to train at which scale, and what the rows say."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from parscale.experiments.runs import Run, Scale
from parscale.experiments.verdicts import Verdict

Measurements = Iterable[tuple[str, Callable[[], list[dict[str, Any]]]]]
"""The key of each measurement, and the function that gives its rows."""


@dataclass(frozen=True)
class Claim:
    """One claim of the method, or an open question of the paper.

    Attributes:
        name: of the experiment on the command line.
        sentence: the claim.
        expected: what came before, or what theory says.
        runs: what to train at a scale on the texts of these names.
        verdict: what rows of one scale say.
        paper_texts: what its runs of the paper's scale are trained on.
        corpora: how many texts it needs at least.
        chats: whether its runs take the first text and the chats, instead of all texts.
        measurements: what to measure instead of training.
    """

    name: str
    sentence: str
    expected: str
    runs: Callable[[Scale, Sequence[str]], list[Run]]
    verdict: Callable[[Sequence[dict[str, Any]]], Verdict]
    paper_texts: tuple[str, ...] = ("code (Stack-V2-Python)",)
    corpora: int = 1
    chats: bool = False
    measurements: Callable[[Scale], Measurements] | None = None
