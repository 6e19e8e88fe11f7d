"""Supervised fine-tuning: conversations and prompts with completions, through TRL's SFTTrainer; the loss is on answers.

Every answer becomes an example of its own: all that was said before it is the prompt, and no label. So the loss is on
the answers alone with any chat template, whether or not it marks them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from parscale.errors import InputError, first_line
from parscale.output import say
from parscale.train.config import TrainConfig
from parscale.train.corpus import read_rows
from parscale.train.data import PackedText

PLAIN_TEMPLATE = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ message['role'] + ':\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant:\n' }}{% endif %}"
)
"""A chat template that needs no token of its own but the end-of-text token."""

VALIDATION_FRACTION = 0.05
_ROLES = ("system", "user", "assistant", "tool")


def load_chats(config: TrainConfig, tokenizer: Any, *, leave_out_long: bool = False) -> PackedText:
    """The examples of `config.data` and `config.validation`: `input_ids` and `completion_mask` (T,), 1 on the answer.

    Without validation data, rows are held out by the hash of their content, 5 % of them. The tokenizer gets the chat
    template that `config.chat_template` names. With `leave_out_long` examples longer than `config.block_size` are left
    out, and told, instead of refused.

    Raises:
        InputError: a row that is neither `messages` nor `prompt` and `completion`, or has half of a surrogate pair; a
            tokenizer without a chat template that needs one, or with one that cannot be applied, or whose prompts are
            not the beginning of the conversation; an example longer than `config.block_size`; a row on both sides;
            nothing to train on.
    """
    _set_template(tokenizer, config.chat_template)
    rows = _distinct(read_rows(config.data))
    if config.validation:
        held_out = _distinct(read_rows(config.validation, split="validation"))
        if shared := rows.keys() & held_out.keys():
            place, twin = held_out[min(shared)][0], rows[min(shared)][0]
            raise InputError(f"validation row {place} is in the training data too, as {twin}: remove one of them")
    else:
        chosen = sorted(rows)[: max(1, round(VALIDATION_FRACTION * len(rows)))]
        held_out = {digest: rows.pop(digest) for digest in chosen if len(rows) > 1}
    train, validation = (
        _examples(side.values(), tokenizer, config.block_size, name, config.data, leave_out_long)
        for side, name in ((rows, "training"), (held_out, "validation"))
    )
    return PackedText(
        train=train,
        validation=validation,
        tokenizer=tokenizer,
        block_size=config.block_size,
        train_tokens=_tokens(train),
        validation_tokens=_tokens(validation),
        train_documents=len(rows),
        validation_documents=len(held_out),
        fingerprint=hashlib.sha256(json.dumps([train.to_dict(), validation.to_dict()]).encode()).hexdigest(),
    )


def sft_trainer(trainer: type, tokenizer: Any) -> Callable[..., Any]:
    """A Trainer class in front of TRL's SFTTrainer, which makes the labels and the batches."""
    trl = _trl()
    made: Any = type(f"SFT{trainer.__name__}", (trainer, trl.SFTTrainer), {})
    return partial(made, processing_class=tokenizer)


def sft_arguments(**options: Any) -> Any:
    """`SFTConfig` of TRL: nothing cut, nothing packed, the loss on completions, checkpointing as the model has it."""
    settings = _trl().SFTConfig
    names = ("activation_checkpointing", "gradient_checkpointing")  # older transformers know the second alone
    checkpointing = next(name for name in names if name in settings.__dataclass_fields__)
    return settings(max_length=None, packing=False, completion_only_loss=True, **{checkpointing: False}, **options)


def examples_of(row: dict[str, Any], place: str, tokenizer: Any) -> Iterator[tuple[list[int], int]]:
    """(token ids, length of the prompt) for every answer of a row.

    Raises:
        InputError: naming the place and what is wrong with the row.
    """
    if "messages" in row:
        messages = _messages(row["messages"], place)
        for end, message in enumerate(messages, start=1):
            if message["role"] == "assistant":
                yield _answer(messages[: end - 1], messages[:end], place, tokenizer)
    elif isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        yield [*prompt, *answer, tokenizer.eos_token_id], len(prompt)
    else:
        raise InputError(
            f"{place}: give a list `messages`, or the texts `prompt` and `completion`; here are {', '.join(row) or '-'}"
        )


def _set_template(tokenizer: Any, name: str | None) -> None:
    if name == "plain":
        tokenizer.chat_template = PLAIN_TEMPLATE
    elif name is not None:
        try:
            tokenizer.chat_template = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"chat_template={name!r}: give 'plain' or a Jinja file ({error})") from None


def _distinct(rows: Iterable[tuple[str, dict[str, Any]]]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Rows by the hash of what they say."""
    distinct: dict[str, tuple[str, dict[str, Any]]] = {}
    for place, row in rows:
        said = row.get("messages") or [row.get("prompt"), row.get("completion")]
        try:
            json.dumps(said, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InputError(f"{place}: half of a surrogate pair is in it, which is not text; remove it") from None
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
        distinct.setdefault(digest, (place, row))
    return distinct


def _examples(
    rows: Iterable[tuple[str, Any]], tokenizer: Any, block_size: int, side: str, source: Any, leave_out_long: bool
) -> Any:
    from datasets import Dataset

    long = 0

    columns: dict[str, list[list[int]]] = {"input_ids": [], "completion_mask": []}
    for place, row in rows:
        for ids, prompt in examples_of(row, place, tokenizer):
            if len(ids) > block_size and leave_out_long:
                long += 1
                continue
            if len(ids) > block_size:
                raise InputError(f"{place}: the example has {len(ids)} tokens, block_size={block_size}; raise it")
            columns["input_ids"].append(ids)
            columns["completion_mask"].append([0] * prompt + [1] * (len(ids) - prompt))
    kept = len(columns["input_ids"])
    if long:
        say(f"{long:,} of {kept + long:,} examples for {side} are longer than {block_size} tokens, and left out")
    if not kept:
        raise InputError(f"data={source}: no answer for {side} is in it; give more rows with an assistant's turn")
    return Dataset.from_dict(columns)


def _messages(messages: Any, place: str) -> list[dict[str, str]]:
    good = isinstance(messages, list) and all(
        isinstance(m, dict) and m.get("role") in _ROLES and isinstance(m.get("content"), str) for m in messages
    )
    if not good:
        raise InputError(f"{place}: `messages` must be a list of objects with a role of {_ROLES} and a text `content`")
    return messages


def _answer(
    prompt: list[dict[str, str]], conversation: list[dict[str, str]], place: str, tokenizer: Any
) -> tuple[list[int], int]:
    if not tokenizer.chat_template:
        raise InputError(
            f"{place} has `messages`, and the tokenizer has no chat template: give chat_template='plain' or a Jinja "
            "file, or rows of `prompt` and `completion`"
        )
    # As text first: cut at the answer's first character, not within a token that a template's end might merge into.
    try:
        asked = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    except Exception as error:  # a mistake in it, which may raise anything, or its own refusal of a role
        raise InputError(f"{place}: the chat template cannot be applied to it ({first_line(error)})") from None
    if not whole.startswith(asked):
        raise InputError(
            f"{place}: with this chat template the prompt is not the beginning of the conversation, so the answer "
            "cannot be told from it; give another chat_template"
        )
    before = tokenizer(asked, add_special_tokens=False)["input_ids"]
    answer = tokenizer(whole[len(asked) :], add_special_tokens=False)["input_ids"]
    return [*before, *answer], len(before)


def _tokens(examples: Any) -> int:
    return sum(map(len, examples["input_ids"]))


def _trl() -> Any:
    try:
        import trl
    except ImportError:
        raise InputError("stage 'sft' needs the package trl: pip install 'parscale[sft]'") from None
    return trl
