"""From a run's settings to its text: whose tokenizer, one corpus or several, in memory or on disk, and what else the
loss is measured on."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from parscale.errors import InputError
from parscale.load import load_tokenizer
from parscale.output import say
from parscale.train.config import TrainConfig
from parscale.train.data import PackedText, load_text
from parscale.train.mix import load_mix
from parscale.train.parallel import is_first_process
from parscale.train.sft import load_chats
from parscale.train.shapes import SHAPES
from parscale.train.streaming import stream_text

FORGETTING = "forgetting"
"""Name of the corpus on which forgetting is measured, among a text's `corpora`."""
FLATTERS = 0.1
"""Share of the held-out text in the training text from which on it is told."""


def prepare(config: TrainConfig) -> PackedText:
    """The text of a run.

    Raises:
        InputError: bad text, tokenizer or settings.
    """
    options: dict[str, Any] = {
        "tokenizer": tokenizer_of(config),
        "vocab_size": config.vocab_size,
        "block_size": config.block_size,
        "text_column": config.text_column,
        "cache_dir": config.cache_dir,
    }
    if config.stage == "sft" and (config.mix or config.streaming or config.separate_documents):
        raise InputError("stage 'sft' with mix, streaming or separate_documents: its examples are apart and in memory")
    if config.validation and (config.mix or config.streaming):
        flag = "mix" if config.mix else "streaming"
        raise InputError(f"validation={config.validation} with {flag}: it holds documents out by itself; leave one out")
    if config.mix and config.streaming:
        raise InputError("mix with streaming: not both; give a folder with both corpora, or leave streaming out")
    if config.stage == "sft":
        text = load_chats(config, options["tokenizer"])
    elif config.mix:
        text = load_mix(config.data, config.mix, seed=config.seed, **options)
    elif config.streaming:
        text = stream_text(config.data, **options)
    else:
        text = load_text(config.data, validation=config.validation or None, **options)
    if text.overlap is not None and text.overlap > FLATTERS and is_first_process():
        say(
            f"{text.overlap:.0%} of the held-out text (its runs of 13 words) stands in the training text too, so its "
            "loss flatters; give --validation text of another source"
        )
    if config.forgetting:
        options |= {"tokenizer": text.tokenizer, "max_train_tokens": config.block_size}
        other = load_text(config.forgetting, **options)
        blocks = other.validation if config.stage != "sft" else other.validation.with_format(None)  # as TRL takes them
        both = hashlib.sha256(f"{text.fingerprint} {other.fingerprint}".encode()).hexdigest()
        text = replace(text, corpora=text.corpora | {FORGETTING: blocks}, fingerprint=both)
    if config.separate_documents:
        text = replace(text, end_of_text=text.tokenizer.eos_token_id)
    return text


def tokenizer_of(config: TrainConfig) -> Any:
    """The tokenizer that a run names, or its trained model's own; None where one is to be trained.

    Raises:
        InputError: there is no trained model, or its tokenizer cannot be loaded, or gives other ids than the one that
            it was trained with.
    """
    if config.stage == "pretrain":
        return load_tokenizer(config.tokenizer) if config.tokenizer else None
    if config.model in SHAPES and not Path(config.model).exists():
        raise InputError(f"stage {config.stage!r} goes on from a trained model: give --model FOLDER, or a hub name")
    if config.tokenizer is None:
        return load_tokenizer(config.model)
    given = load_tokenizer(config.tokenizer)
    try:
        own = load_tokenizer(config.model)
    except InputError:  # the model's folder has none: its name is all that there is to go by
        return given
    if given.get_vocab() != own.get_vocab():
        raise InputError(
            f"tokenizer={config.tokenizer!r} is not the vocabulary that {config.model!r} was trained with; leave it out"
        )
    return given
