"""What a run of an experiment is, at which scale, and what makes two runs the same run."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from parscale.config import StreamsConfig
from parscale.experiments.shapes import hidden_size
from parscale.train.config import MANY_STREAMS, SLOW_HEAD, Balance, Stage

ScaleName = Literal["smoke", "cpu", "gpu", "paper"]


LABELS = ("name", "place", "variant", "at")
"""Fields of a run for the eyes of its claim: they are in no key."""


@dataclass(frozen=True)
class Run:
    """One training of an experiment. A seed makes it a row.

    Args:
        name: what the experiment calls it, and no other run of a text; not part of what it is, and not parsed.
        corpus: name of the text, as given to `--corpus`.
        model: a shape (`train.shapes.SHAPES`, `experiments.shapes`), or a size of the paper where it is not run.
        streams: the streams.
        tokens: training tokens.
        batch_size: sequences a step.
        block_size: tokens in each.
        vocab_size: of the BPE that is trained on the text of the first model of the chain.
        stage: pretrain, retrofit, frozen or sft.
        start: the run whose model this one continues; None for pretrain.
        control: the run whose model the streams' errors are measured against.
        forgetting: name of a text on which the loss is measured before and after.
        balance: what keeps the streams apart in training.
        place: what it is compared within: a stage or a size, as the claim has it. Not part of what it is.
        variant: what tells it from other runs of its place with as many streams. Not part of what it is.
        at: where it stands on the claim's axis. Not part of what it is.
    """

    name: str
    corpus: str
    model: str
    streams: StreamsConfig
    tokens: int
    batch_size: int
    block_size: int
    vocab_size: int
    stage: Stage = "pretrain"
    start: "Run | None" = None
    control: "Run | None" = None
    forgetting: str = ""
    balance: Balance = field(default_factory=Balance)
    learning_rate: float = 3e-3
    stream_learning_rate: float = 1e-2
    head_rate: float = 1.0
    decay: float = 0.5
    place: str = ""
    variant: str = ""
    at: float = 0.0

    @property
    def depth(self) -> int:
        """0 for a run that needs no other one's model; else one more than those that it needs."""
        needed = [other.depth for other in (self.start, self.control) if other is not None]
        return 1 + max(needed) if needed else 0

    @property
    def root(self) -> "Run":
        """The run from which its chain of models starts: its text makes the tokenizer."""
        return self if self.start is None else self.start.root

    def describe(self) -> dict[str, Any]:
        """All that makes it this run, without what is as by default: new options leave the keys of old rows alone."""
        told: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name in LABELS or value == entry.default:
                continue
            if isinstance(value, Run):
                told[entry.name] = value.describe()
            elif isinstance(value, StreamsConfig | Balance):
                default = asdict(type(value)())
                if other := {k: v for k, v in asdict(value).items() if v != default[k]}:
                    told[entry.name] = other
            else:
                told[entry.name] = value
        return told

    def key(self, seed: int, scale: str) -> str:
        """What tells its row from all others: 16 hexadecimal digits."""
        told = json.dumps([self.describe(), seed, scale], sort_keys=True, default=list)
        return hashlib.sha256(told.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Scale:
    """Sizes and rates that the experiments of one scale start from; chosen by measurement, see LOG.md."""

    name: ScaleName
    model: str
    sizes: tuple[str, ...]
    """Of the scaling law, ascending."""
    vocab_size: int
    block_size: int
    batch_size: int
    base_tokens: int
    """Of the plain model that stage 2 continues."""
    tokens: int
    """Of every other run from scratch."""
    second_tokens: int
    """Of a run that continues a model."""
    streams: tuple[int, ...] = (2, 4)
    text_tokens: int = 20_000_000
    """Of a text at most; a run that is longer passes over it again."""
    lora_rank: int = 8
    learning_rate: float = 3e-3
    """Of the backbone of `model`; other widths get one that is inversely proportional to theirs."""
    stream_learning_rate: float = 1e-2
    validation_blocks: int = 256
    """Sequences that the loss is measured on; a quarter of them for the closer look at the streams."""
    evaluations: int = 4

    def run(self, name: str, corpus: str, streams: StreamsConfig, **changes: Any) -> Run:
        """A run with this scale's sizes, except for what `changes` says."""
        given: dict[str, Any] = {
            "model": self.model,
            "tokens": self.tokens if changes.get("stage", "pretrain") == "pretrain" else self.second_tokens,
            "batch_size": self.batch_size,
            "block_size": self.block_size,
            "vocab_size": self.vocab_size,
            "learning_rate": self.by_width(self.learning_rate, changes.get("model", self.model)),
            "stream_learning_rate": self.stream_learning_rate,
        }
        return Run(name, corpus, streams=streams, **given | changes)

    def by_width(self, rate: float, model: str) -> float:
        """A rate of this scale's own width, for that of `model`: Adam's best one for matrices falls as one over their
        width (arXiv 2203.03466, table 3). A rate for one size alone would pass for an effect of size."""
        width, own = hidden_size(model), hidden_size(self.model)
        return rate * own / width if own and width else rate

    def base(self, corpus: str, **changes: Any) -> Run:
        """The plain model that stage 2 continues."""
        return self.run("base", corpus, PLAIN, **{"tokens": self.base_tokens, "decay": 0.0} | changes)

    def lora(self, streams: int, **changes: Any) -> StreamsConfig:
        """Streams told apart by a prefix and a LoRA each: what worked on small models."""
        return StreamsConfig(
            streams, **{"diversify": ("prefix", "lora"), "lora_rank": self.lora_rank, **PREFIX[self.name]} | changes
        )

    def prefix(self, streams: int, **changes: Any) -> StreamsConfig:
        """The paper's streams."""
        return StreamsConfig(streams, **PREFIX[self.name] | changes)


PLAIN = StreamsConfig(1, 0)
EVEN: dict[str, Any] = {"balance": Balance(load_balance=0.01)}
SLOW: dict[str, Any] = {"head_rate": SLOW_HEAD}
"""What keeps many streams in use that are trained from scratch; with neither a head may pick one of them before they
differ. A slow head ends lower (claim `balance`)."""
MANY = MANY_STREAMS
"""Streams from which on runs from scratch have a slow head."""
PREFIX: dict[str, dict[str, Any]] = {"smoke": {"prefix_tokens": 8}, "cpu": {}, "gpu": {}, "paper": {}}

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        "smoke", "pico", ("1x16x2", "pico", "2x48x3"), 384, 32, 8, 6 * 256, 6 * 256, 6 * 256,
        text_tokens=100_000, lora_rank=2, validation_blocks=16, evaluations=1,
    ),
    "cpu": Scale(
        "cpu", "pico", ("2x16x2", "2x24x2", "pico", "2x48x3", "nano"), 512, 128, 16,
        800 * 2048, 2400 * 2048, 600 * 2048, (2, 4, 8), learning_rate=2e-2, stream_learning_rate=2e-2,
    ),
    "gpu": Scale(
        "gpu", "6x384x6", ("6x384x6", "6x512x8", "small", "8x640x10", "10x768x12"), 2048, 256, 64,
        1200 * 16384, 1200 * 16384, 1200 * 16384, (2, 4, 8), learning_rate=2e-3,
    ),
    "paper": Scale(
        "paper", "1.6B", ("0.5B", "0.7B", "1.1B", "1.6B", "2.8B", "4.4B"), 151_936, 2048, 1024,
        10**12, 42 * 10**9, 42 * 10**9, (2, 4, 8), text_tokens=10**12,
    ),
}  # fmt: skip


def remedy(streams: int) -> dict[str, Any]:
    """What so many streams have from scratch: two need none (LOG.md)."""
    return SLOW if streams >= MANY else {}


def against(control: Run, runs: list[Run]) -> list[Run]:
    """The control, and the runs, whose streams are measured against it."""
    return [control, *(replace(run, control=control) if run.streams.streams > 1 else run for run in runs)]
