"""What a training run may be told: every flag of `parscale train`, its default and its check.

Loads nothing heavy, so that the command line can show its help at once.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from parscale.config import StreamsConfig
from parscale.errors import InputError
from parscale.train.corpus import STDLIB

Stage = Literal["pretrain", "retrofit", "frozen", "sft"]


NOT_GIVEN = StreamsConfig()
"""This very object stands where nothing is said of the streams: a model that has some goes on with them. An equal one
that is another object was asked for."""


MANY_STREAMS = 4
SLOW_HEAD = 0.1
"""The head's rate where so many streams are trained from scratch and nothing is said of it (LOG.md)."""


def whole_number(text: str | float) -> int:
    """An integer, also as 1e6. Raises ValueError for anything else."""
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text} is not a whole number")
    return int(number)


Count = Annotated[
    int,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda strings: whole_number(strings[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    ),
]
"""A number that a person may write as 1e9."""


@dataclass(frozen=True)
class Rates:
    """Learning rates and weight decay by parameter group; `backbone_delay` is the share of the steps, at the start,
    in which the backbone's rate is 0, and `head_rate` the head's rate as a share of the backbone's."""

    learning_rate: float
    stream_learning_rate: float
    weight_decay: float
    backbone_delay: float = 0.0
    head_rate: float = 1.0

    def __post_init__(self) -> None:
        for name in ("learning_rate", "stream_learning_rate", "weight_decay", "head_rate"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise InputError(f"{name}={value!r} is not accepted; give a number >= 0")
        if self.learning_rate == 0 and self.stream_learning_rate == 0:
            raise InputError("learning_rate=0 and stream_learning_rate=0: nothing would train; give one above 0")
        if not 0 <= self.backbone_delay < 1:
            raise InputError(f"backbone_delay={self.backbone_delay} is not accepted; give a share of the steps below 1")


@dataclass(frozen=True)
class Balance:
    """What keeps the streams apart and in use while they train. All off by default: the paper's training.

    Args:
        smoothing_start: ε at the first step; it falls linearly to the model's own. 1 is the mean of the streams.
        temperature_start: temperature of the weights' softmax at the first step; it falls linearly to 1.
        smoothing_share: share of the steps in which ε and the temperature fall.
        load_balance: weight of a penalty on uneven shares of the streams, as for sparse experts.
        entropy_floor: effective streams below which a penalty of what the weights' entropy lacks is added.
        decorrelation: weight of a penalty on the squared correlation of the streams' final hidden states.
        stream_dropout: chance that a stream is left out of a step.
        fewer_streams: chance that a step runs a random p < P of the first streams, for models to be run at any p.
    """

    smoothing_start: float | None = None
    temperature_start: float = 1.0
    smoothing_share: float = 0.5
    load_balance: float = 0.0
    entropy_floor: float = 0.0
    decorrelation: float = 0.0
    stream_dropout: float = 0.0
    fewer_streams: float = 0.0

    def __post_init__(self) -> None:
        for name in ("smoothing_start", "stream_dropout", "fewer_streams"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"{name}={value!r} is not accepted; give a number from 0 to 1")
        for name in ("load_balance", "entropy_floor", "decorrelation"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)!r} is not accepted; give a number >= 0")
        if not 1 <= self.temperature_start < math.inf:
            raise InputError(f"temperature_start={self.temperature_start!r} is not accepted; give a number >= 1")
        if not 0 < self.smoothing_share <= 1:
            raise InputError(f"smoothing_share={self.smoothing_share!r} is not accepted; give a share of the steps")

    @property
    def penalizes(self) -> bool:
        """Whether something is added to the loss."""
        return self.load_balance > 0 or self.decorrelation > 0 or self.entropy_floor > 0

    @property
    def is_off(self) -> bool:
        """Whether training is the paper's."""
        return self == Balance()


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Every field is a flag of `parscale train` and a key of a recipe.

    Args:
        stage: pretrain (everything from scratch), retrofit (all weights of a trained model, streams added), frozen
            (only what the streams add), or sft (answers to prompts, on a model with or without streams).
        output: folder for the trained model, tokenizer and `train.json`; it must not hold anything yet.
        model: pretrain: a shape (pico, nano, micro, mini, small, base), or whose configuration to use; else the
            trained model. A folder or a hub name.
        streams: the streams (their fields are flags of their own).
        balance: what keeps the streams apart and in use in training (its fields are flags of their own).
        data: text: a folder, files (txt, md, py, jsonl, jsonl.zst, parquet), a data set's name, or "stdlib", the
            Python standard library's own source. sft: JSON lines with `messages`, or with `prompt` and `completion`.
        mix: a weight for each of `data`, which are then corpora of their own: sequences are drawn by weight, and the
            validation loss of each is measured.
        validation: held-out text; by default 5 % of the documents of `data`.
        forgetting: text of another kind, on which the loss is measured before and after.
        tokenizer: folder or hub name; by default the model's own, or for pretrain a byte-level BPE of the corpus.
        vocab_size: of that BPE.
        block_size: tokens in a training sequence; sft: longer examples are refused.
        separate_documents: no document in a sequence sees another one: positions start anew with each.
        streaming: read documents one by one and keep tokens on disk, for corpora larger than memory.
        text_column: name of the text in JSON lines, parquet and data sets.
        chat_template: sft: a Jinja file, or "plain", for tokenizers that have none.
        tokens: training tokens to see; by default one pass over the data.
        batch_size: sequences a step, on each device.
        learning_rate: of the backbone (or its LoRA), at its peak.
        stream_learning_rate: of prefixes and other parameters that tell the streams apart.
        head_rate: learning rate of the aggregation head, as a share of `learning_rate`. By default 1, and from scratch
            with four streams or more 0.1, which keeps all of them in use.
        weight_decay: of the backbone's matrices.
        schedule: wsd (warm-up, stable, linear decay) or cosine (warm-up, then half a cosine to zero).
        warmup: share of the steps in which the rates rise.
        decay: wsd: share of the steps, at the end, in which the rates fall linearly to zero.
        backbone_delay: share of the steps, at the start, in which only what the streams add is trained.
        gradient_clip: largest norm of the gradient.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        peft: lora: train a LoRA of the backbone instead of its weights.
        peft_rank: rank of that LoRA.
        quantize: frozen, or with a LoRA: hold the backbone's weights in 8 or 4 bits (CPU: torchao; GPU: bitsandbytes).
        dtype: of a loaded model's weights while they train, and as they are saved. bfloat16 takes half the memory, and
            rounds small steps away. From scratch weights are float32, and so are streams and a LoRA where the backbone
            rests, whatever it is in.
        evaluations: how often to measure the validation loss, evenly spread; the last is at the end.
        validation_blocks: sequences to measure it on, at most.
        smooth_validation: share of the past in the running mean of the validation loss.
        patience: stop after so many evaluations in which that mean has not fallen; by default never.
        control: train P=1 with a prefix on the same tokens too, and report the gain over it.
        save_every: write a checkpoint into `output` every so many steps; by default only when the run is stopped.
        keep: how many checkpoints to keep, the newest.
        resume: go on from the newest checkpoint in `output`, or start if there is none.
        max_skipped: stop after so many steps in a row whose loss or gradient was not finite; such steps are skipped.
        stream_parallel: split the streams over so many processes, each of which runs its share of them.
        seed: of weights, data order and everything else.
        report_to: loggers of the Trainer: tensorboard, trackio, wandb, or none.
        cache_dir: folder for tokenised text.
    """

    stage: tyro.conf.Positional[Stage]
    output: Path
    model: str = "micro"
    streams: Annotated[StreamsConfig, tyro.conf.arg(name="")] = NOT_GIVEN
    balance: Annotated[Balance, tyro.conf.arg(name="")] = field(default_factory=Balance)
    data: tuple[str, ...] = (STDLIB,)
    mix: tuple[float, ...] = ()
    validation: tuple[str, ...] = ()
    forgetting: tuple[str, ...] = ()
    tokenizer: str | None = None
    vocab_size: int = 2048
    block_size: int = 256
    separate_documents: bool = False
    streaming: bool = False
    text_column: str = "text"
    chat_template: str | None = None
    tokens: Count | None = None
    batch_size: int = 16
    learning_rate: float = 3e-3
    stream_learning_rate: float = 1e-2
    head_rate: float | None = None
    weight_decay: float = 0.1
    schedule: Literal["wsd", "cosine"] = "wsd"
    warmup: float = 0.05
    decay: float = 0.2
    backbone_delay: float = 0.0
    gradient_clip: float = 1.0
    gradient_checkpointing: bool = False
    peft: Literal["none", "lora"] = "none"
    peft_rank: int = 8
    quantize: Literal["none", "int8", "int4"] = "none"
    dtype: Literal["float32", "bfloat16"] = "float32"
    evaluations: int = 4
    validation_blocks: int = 256
    smooth_validation: float = 0.5
    patience: int | None = None
    control: bool = False
    save_every: int | None = None
    keep: int = 2
    resume: bool = False
    max_skipped: int = 10
    stream_parallel: int = 1
    seed: int = 0
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "evaluations", "validation_blocks", "peft_rank"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not accepted; give an integer >= 1")
        for name in ("keep", "max_skipped", "stream_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} is not accepted; give an integer >= 1")
        if not self.gradient_clip > 0:
            raise InputError(f"gradient_clip={self.gradient_clip} is not accepted; give a number above 0")
        if self.save_every is not None and self.save_every < 1:
            raise InputError(f"save_every={self.save_every} is not accepted; give an integer >= 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"seed={self.seed} is not accepted; give an integer from 0 to {2**32 - 1}")
        if self.patience is not None and self.patience < 1:
            raise InputError(f"patience={self.patience} is not accepted; give an integer >= 1")
        if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
            raise InputError(f"warmup={self.warmup} and decay={self.decay} are shares of the steps: give a sum up to 1")
        if not 0 <= self.smooth_validation < 1:
            raise InputError(f"smooth_validation={self.smooth_validation} is not accepted; give a share below 1")
        if self.tokens is not None and self.tokens < self.batch_size * self.block_size:
            raise InputError(
                f"tokens={self.tokens} is less than one step of {self.batch_size} × {self.block_size} tokens; give more"
            )
        if self.mix and (len(self.mix) != len(self.data) or not all(weight > 0 for weight in self.mix)):
            raise InputError(
                f"mix={self.mix} with data={self.data}: give one weight above 0 for each of the {len(self.data)}"
            )
        if self.stage == "pretrain" and self.peft != "none":
            raise InputError(f"peft={self.peft!r} with stage 'pretrain': there is no trained backbone; take 'retrofit'")
        if self.stage == "frozen" and self.peft != "none":
            raise InputError("stage 'frozen' trains what the streams add alone; for a LoRA too, take 'retrofit'")
        if self.quantize != "none" and (self.stage == "pretrain" or (self.stage != "frozen" and self.peft == "none")):
            raise InputError(
                f"quantize={self.quantize!r} with stage {self.stage!r}: few bits cannot be trained; take 'frozen', or "
                "'retrofit' or 'sft' with peft='lora'"
            )
        _ = self.rates

    @property
    def rates(self) -> Rates:
        """The learning rates, checked."""
        return Rates(
            self.learning_rate,
            self.stream_learning_rate,
            self.weight_decay,
            self.backbone_delay,
            self._head_rate,
        )

    @property
    def _head_rate(self) -> float:
        """From scratch a fast head may pick one of many streams before they differ, and starve the rest."""
        if self.head_rate is not None:
            return self.head_rate
        return SLOW_HEAD if self.stage == "pretrain" and self.streams.streams >= MANY_STREAMS else 1.0
