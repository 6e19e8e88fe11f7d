"""Instruction tuning with streams against without, on the same answers."""

from collections.abc import Sequence

from parscale.experiments.claim import Claim
from parscale.experiments.runs import Run, Scale, against
from parscale.experiments.verdicts import Row, Verdict, by_corpus, over_control, paired, runs_of


def runs(scale: Scale, corpora: Sequence[str]) -> list[Run]:
    """The text makes the base; the chats are JSON lines of prompt and completion, or of messages. A conversation may be
    four times as long as a block of text, so that the scale's tokens are a quarter of its steps."""
    if scale.name == "paper":
        return []
    home, *chats = corpora
    found = []
    for chat in chats:
        common = {
            "stage": "sft",
            "start": scale.base(home),
            "block_size": 4 * scale.block_size,
        }
        streamed = [scale.run(f"P={p}", chat, scale.lora(p), **common) for p in scale.streams[:2]]
        found += against(scale.run("control", chat, scale.lora(1), **common), streamed)
    return found


def verdict(rows: Sequence[Row]) -> Verdict:
    outcomes, said = [], []
    for corpus, of in by_corpus(rows).items():
        for name in (name for name, run in runs_of(of).items() if run.control is not None):
            gain = paired(of, name, "control")
            outcomes.append(gain.outcome)
            said.append(f"{name} on {corpus}: {gain}")
    reason = "Loss on held-out answers, over the control: " + "; ".join(said) + "."
    return Verdict(outcomes, reason, over_control(rows))


CLAIM = Claim(
    "sft",
    "Tuned on the same instructions, a model with streams ends at a lower loss on held-out answers than one without.",
    "Open: the base is plain, and gets its streams with the instructions. The paper tunes models that were trained "
    "with streams, and finds that their gain stays (section 4.1).",
    runs,
    verdict,
    chats=True,
)
