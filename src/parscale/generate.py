"""Completing a prompt, as `parscale generate` and the demo do, and what ends a text; the rest is `model.generate`'s."""

from typing import Any

import torch

from parscale.errors import InputError
from parscale.streams.adaptive import HardTokens
from parscale.streams.backbone import has_streams
from parscale.train.shapes import learned_positions


def complete(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    streams: int | None = None,
    hard_entropy: float | None = None,
    streamer: Any = None,
) -> str:
    """The model's continuation of a prompt, without the prompt.

    Args:
        model: a causal LM, with or without streams.
        tokenizer: its tokenizer.
        prompt: at least one token of text.
        max_new_tokens: at most so many tokens more.
        temperature: 0 is greedy; above 0 samples.
        seed: of the sampling.
        streams: run this many of the model's streams; None for all that are active.
        hard_entropy: run one stream where it predicts with no more entropy than so many nats, and `streams` elsewhere.
        streamer: a transformers streamer that gets the tokens as they come.

    Raises:
        InputError: an empty prompt or one that is no text, more tokens than the model has learned positions, a number
            that is not accepted, more streams than the model has, or an entropy for streams with keys of their own.
    """
    if not temperature >= 0:
        raise InputError(f"temperature={temperature} is not accepted; give a number >= 0")
    if max_new_tokens < 1:
        raise InputError(f"max_new_tokens={max_new_tokens} is not accepted; give an integer >= 1")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed={seed} is not accepted; give an integer from 0 to {2**63 - 1}")
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise InputError("the prompt is not UTF-8 text") from None
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("the prompt is empty; give at least one token of text")
    places = learned_positions(model)
    if places is not None and length + max_new_tokens > places:
        raise InputError(
            f"a prompt of {length} tokens and max_new_tokens={max_new_tokens}: the model has learned positions for "
            f"{places} tokens; give no more"
        )
    for option, value in (("streams", streams), ("hard_entropy", hard_entropy)):
        if value is not None and not has_streams(model):
            raise InputError(f"{option}={value}: {type(model).__name__} has no streams")
    chosen: Any = {} if streams is None else {"streams": streams}
    if hard_entropy is not None:
        chosen = {"streams": HardTokens(hard_entropy, model.streams if streams is None else streams)}
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    ids = model.generate(
        **inputs,
        **sampling,
        **chosen,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        streamer=streamer,
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: those of the model's generation_config, or else the tokenizer's; maybe none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
