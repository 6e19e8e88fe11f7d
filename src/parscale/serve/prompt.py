"""From a request to what an engine takes: token ids, how many more, how to draw them; within the server's limits."""

import secrets
from typing import Any

from parscale.errors import first_line
from parscale.serve.engine import Engine
from parscale.serve.sampling import Sampling
from parscale.serve.schema import ChatRequest, CompletionOptions, Refusal, TextRequest


def choices_of(asked: CompletionOptions) -> int:
    """How many answers a request wants, known before anything is tokenised: n for each prompt."""
    return asked.n * (len(_each(asked.prompt)) if isinstance(asked, TextRequest) else 1)


def prompts_of(asked: CompletionOptions, engine: Engine) -> list[list[int]]:
    """Token ids of every prompt; a chat goes through the model's own template.

    Raises:
        Refusal: nothing to go on from, a token that the model has not, a prompt that is too long, or no template.
    """
    if isinstance(asked, ChatRequest):
        prompts = [_chat(asked, engine.tokenizer)]
    else:
        assert isinstance(asked, TextRequest)
        prompts = [engine.tokenizer(one)["input_ids"] if isinstance(one, str) else one for one in _each(asked.prompt)]
    field, limit = asked.prompt_field, engine.limits.max_prompt_tokens
    if not prompts or not all(prompts):
        raise Refusal(400, f"{field}: give at least one token of text", field=field)
    if any(not 0 <= token < engine.vocabulary for prompt in prompts for token in prompt):
        raise Refusal(400, f"{field}: this model's tokens are 0 to {engine.vocabulary - 1}", field=field)
    longest = max(map(len, prompts))
    if longest > min(limit, engine.context - 1):
        raise Refusal(
            400,
            f"{field}: {longest} tokens; at most {min(limit, engine.context - 1)} are taken",
            field=field,
            code="context_length_exceeded",
        )
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


def _chat(asked: ChatRequest, tokenizer: Any) -> list[int]:
    if tokenizer.chat_template is None:
        raise Refusal(400, "messages: this model has no chat template; use /v1/completions", field="messages")
    chat = [message.as_dict() for message in asked.messages]
    try:
        # Most templates leave out the turns of a role that they do not know, without a word.
        if "developer" not in tokenizer.get_chat_template():
            chat = [turn | {"role": "system"} if turn["role"] == "developer" else turn for turn in chat]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    except Exception as error:  # a template may raise anything, down to ZeroDivisionError
        raise Refusal(400, f"messages: the chat template refuses them: {first_line(error)}", field="messages") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _each(prompt: str | list[int] | list[str] | list[list[int]]) -> list[Any]:
    """The prompts of a request: a text or its token ids are one, else it is a list of them."""
    one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    return [prompt] if one else prompt  # type: ignore[return-value]
