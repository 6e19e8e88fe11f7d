"""What a training run may be told: every flag of `parscale train`, its default and its check.

Loads nothing heavy, so that the command line can show its help at once.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.train.corpus import STDLIB

Stage = Literal["pretrain", "retrofit", "frozen"]


@dataclass(frozen=True)
class Rates:
    """Learning rates and weight decay by parameter group."""

    learning_rate: float
    stream_learning_rate: float
    weight_decay: float

    def __post_init__(self) -> None:
        for name in ("learning_rate", "stream_learning_rate", "weight_decay"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)!r} is not accepted; give a number >= 0")
        if self.learning_rate == 0 and self.stream_learning_rate == 0:
            raise InputError("learning_rate=0 and stream_learning_rate=0: nothing would train; give one above 0")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a flag of `parscale train`.

    Args:
        stage: pretrain (everything from scratch), retrofit (all weights of a trained model, streams added), or frozen
            (only what the streams add).
        output: folder for the trained model, tokenizer and `train.json`; it must not hold anything yet.
        model: pretrain: a shape (pico, nano, micro, mini, small, base), or whose configuration to use; retrofit and
            frozen: the trained model. A folder or a hub name.
        streams: the streams (their fields are flags of their own).
        data: text: a folder, files (txt, md, py, jsonl, jsonl.zst, parquet), a data set's name, or "stdlib", the
            Python standard library's own source.
        validation: held-out text; by default 5 % of the documents of `data`.
        tokenizer: folder or hub name; by default the model's own, or for pretrain a byte-level BPE of the corpus.
        vocab_size: of that BPE.
        block_size: tokens in a training sequence.
        text_column: name of the text in JSON lines, parquet and data sets.
        tokens: training tokens to see; by default one pass over the data.
        batch_size: sequences a step, on each device.
        learning_rate: of the backbone and the aggregation head, at its peak.
        stream_learning_rate: of prefixes and other parameters that tell the streams apart.
        weight_decay: of the backbone's matrices.
        warmup: share of the steps in which the rates rise.
        decay: share of the steps, at the end, in which the rates fall linearly to zero.
        gradient_clip: largest norm of the gradient.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        evaluations: how often to measure the validation loss, evenly spread; the last is at the end.
        validation_blocks: sequences to measure it on, at most.
        seed: of weights, data order and everything else.
        report_to: loggers of the Trainer: tensorboard, trackio, wandb, or none.
        cache_dir: folder for tokenised text.
    """

    stage: tyro.conf.Positional[Stage]
    output: Path
    model: str = "micro"
    streams: Annotated[StreamsConfig, tyro.conf.arg(name="")] = field(default_factory=StreamsConfig)
    data: tuple[str, ...] = (STDLIB,)
    validation: tuple[str, ...] = ()
    tokenizer: str | None = None
    vocab_size: int = 2048
    block_size: int = 256
    text_column: str = "text"
    tokens: int | None = None
    batch_size: int = 16
    learning_rate: float = 3e-3
    stream_learning_rate: float = 1e-2
    weight_decay: float = 0.1
    warmup: float = 0.05
    decay: float = 0.2
    gradient_clip: float = 1.0
    gradient_checkpointing: bool = False
    evaluations: int = 4
    validation_blocks: int = 256
    seed: int = 0
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "evaluations", "validation_blocks"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not accepted; give an integer >= 1")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise InputError(f"warmup={self.warmup} and decay={self.decay} are shares of the steps: give a sum up to 1")
        if self.tokens is not None and self.tokens < self.batch_size * self.block_size:
            raise InputError(
                f"tokens={self.tokens} is less than one step of {self.batch_size} × {self.block_size} tokens; give more"
            )
        _ = self.rates

    @property
    def rates(self) -> Rates:
        """The learning rates, checked."""
        return Rates(self.learning_rate, self.stream_learning_rate, self.weight_decay)
