"""From a request to what an engine takes: token ids, how many more, how to draw them; within the server's limits."""

import secrets
from typing import Any

from parscale.serve.engine import Engine
from parscale.serve.limits import TOKEN_BYTES
from parscale.serve.sampling import Sampling
from parscale.serve.schema import ChatRequest, CompletionOptions, Refusal, TextRequest
from parscale.serve.tokenizing import Ended, Tokenizing

BESIDE = 64 * 1024
"""Bytes that the fields beside the messages of a chat may have, on top of what the messages may."""


def choices_of(asked: CompletionOptions) -> int:
    """How many answers a request wants, known before anything is tokenised: n for each prompt."""
    return asked.n * (len(_each(asked.prompt)) if isinstance(asked, TextRequest) else 1)


def most_tokens(engine: Engine) -> int:
    """Of a prompt."""
    return min(engine.limits.max_prompt_tokens, engine.context - 1)


def check_size(fields: dict[str, Any], kind: type[CompletionOptions], size: int, engine: Engine) -> None:
    """Refuse a request whose prompt is too long in any case, before its fields are looked at one by one.

    Args:
        fields: from JSON; of any type.
        kind: of the request.
        size: bytes of its JSON.
        engine: see `Engine`.

    Raises:
        Refusal: a text or a list of tokens that is too long, or a chat that is, with whatever stands beside it.
    """
    tokens, field = most_tokens(engine), kind.prompt_field
    if kind is ChatRequest and size > BESIDE + TOKEN_BYTES * tokens:
        raise _too_many_bytes(field, size, tokens)
    prompt = fields.get(field) if kind is TextRequest else None
    texts = [item for item in (prompt if isinstance(prompt, list) else [prompt]) if isinstance(item, str)]
    if texts and (longest := max(len(text.encode()) for text in texts)) > TOKEN_BYTES * tokens:
        raise _too_many_bytes(field, longest, tokens)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], int) and len(prompt) > tokens:
        raise _too_many_tokens(field, len(prompt), tokens)


async def prompts_of(asked: CompletionOptions, engine: Engine, tokenizing: Tokenizing) -> list[list[int]]:
    """Token ids of every prompt; a chat goes through the model's own template.

    Raises:
        Refusal: nothing to go on from, a token that the model has not, a prompt that is too long or does not come to
            its end, or no template.
    """
    field, most = asked.prompt_field, most_tokens(engine)
    if isinstance(asked, ChatRequest):
        if engine.tokenizer.chat_template is None:
            raise Refusal(400, "messages: this model has no chat template; use /v1/completions", field="messages")
        chat = [message.as_dict() for message in asked.messages]
        prompts = await _tokens({"chat": chat, "most_bytes": TOKEN_BYTES * most}, field, engine, tokenizing)
    else:
        assert isinstance(asked, TextRequest)
        prompts: list[Any] = _each(asked.prompt)
        if prompts and isinstance(prompts[0], str):
            prompts = await _tokens({"texts": prompts}, field, engine, tokenizing)
    if not prompts or not all(prompts):
        raise Refusal(400, f"{field}: give at least one token of text", field=field)
    if (longest := max(map(len, prompts))) > most:
        raise _too_many_tokens(field, longest, most)
    if any(not 0 <= token < engine.vocabulary for prompt in prompts for token in prompt):
        raise Refusal(400, f"{field}: this model's tokens are 0 to {engine.vocabulary - 1}", field=field)
    return prompts


def new_tokens(asked: CompletionOptions, prompts: list[list[int]], engine: Engine) -> int:
    """How many tokens an answer may have: what was asked for, or by default what there is room for.

    Raises:
        Refusal: more was asked for than the server gives or the model's context holds.
    """
    field, wanted = "max_tokens", asked.max_tokens
    if isinstance(asked, ChatRequest) and asked.max_completion_tokens is not None:
        field, wanted = "max_completion_tokens", asked.max_completion_tokens
    room = min(engine.limits.max_new_tokens, engine.context - max(map(len, prompts)))
    if wanted is None or field not in asked.model_fields_set:
        return min(room, wanted or room)
    if wanted > room:
        raise Refusal(400, f"{field}={wanted}: at most {room} after this prompt", field=field)
    return wanted


def samplings_of(asked: CompletionOptions, choices: int) -> list[Sampling | None]:
    """How each choice draws. It is greedy below a temperature of 1e-5, and where top_p leaves one token only."""
    if asked.temperature < 1e-5 or asked.top_p == 0:
        return [None] * choices
    seed = secrets.randbits(63) if asked.seed is None else asked.seed
    return [Sampling(asked.temperature, asked.top_p, seed, choice) for choice in range(choices)]


async def _tokens(asked: dict[str, Any], field: str, engine: Engine, tokenizing: Tokenizing) -> list[list[int]]:
    try:
        made = await tokenizing(asked)
    except Ended:
        what = "the chat template" if "chat" in asked else "tokenising it"
        seconds = engine.limits.max_prompt_seconds
        raise Refusal(
            400, f"{field}: {what} took more than {seconds} s, or too much memory, and was ended", field=field
        ) from None
    if "refused" in made:
        raise Refusal(400, f"{field}: the chat template refuses them: {made['refused']}", field=field)
    if "bytes" in made:
        raise _too_many_bytes(field, made["bytes"], most_tokens(engine))
    return made["tokens"]


def _too_many_tokens(field: str, count: int, most: int) -> Refusal:
    return Refusal(
        400, f"{field}: {count} tokens; at most {most} are taken", field=field, code="context_length_exceeded"
    )


def _too_many_bytes(field: str, count: int, most: int) -> Refusal:
    return Refusal(
        400,
        f"{field}: {count} bytes; at most {most} tokens are taken, of {TOKEN_BYTES} bytes at most on average",
        field=field,
        code="context_length_exceeded",
    )


def _each(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    """The prompts of a request: a text or its token ids are one, else it is a list of them."""
    one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if one else prompt  # type: ignore[return-value]
