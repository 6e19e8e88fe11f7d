"""Requests before an engine sees them: what reading one costs, and what a chat's template is given."""

import json
from typing import Any

import pytest
from pydantic import ValidationError

from parscale.serve.prompt import choices_of
from parscale.serve.schema import ChatRequest, Refusal, TextRequest, read_request
from parscale.serve.tokenizer_child import tokenize
from tests.serve.processes import byte_tokenizer

KNOWS = (
    "{% for message in messages %}{% if message.role == 'developer' %}D:{{ message.content }}{% endif %}{% endfor %}"
)
LEAVES_OUT = (
    "{% for message in messages %}{% if message.role in ('system', 'user', 'assistant') %}"
    "<{{ message.role }}>{{ message.content }}{% endif %}{% endfor %}"
)
CHAT = {"messages": [{"role": "developer", "content": "In French."}, {"role": "user", "content": "Hi"}]}


def ask(kind: Any, body: Any) -> Any:
    return read_request(kind, json.dumps(body).encode())


@pytest.mark.parametrize(
    ("kind", "body", "field"),
    [
        (TextRequest, lambda n: {"prompt": [1, "a"] * n}, "prompt[1]"),
        (TextRequest, lambda n: {"prompt": [[1, "a"] * n]}, "prompt[0][1]"),
        (TextRequest, lambda n: {"prompt": "x", "stop": [""] * n}, "stop[0]"),
        (ChatRequest, lambda n: {"messages": [{"role": "x", "content": 1}] * n}, "messages[0].content"),
        (ChatRequest, lambda n: {"messages": [{"role": "user", "content": [{}] * n}]}, "messages[0].content[0].type"),
    ],
    ids=["prompt", "token ids", "stop", "messages", "parts"],
)
def test_only_the_first_fault_of_a_list_is_collected(kind: Any, body: Any, field: str) -> None:
    """Hundreds of thousands of them would hold up every other request for seconds."""
    asked = body(1000)
    with pytest.raises(ValidationError) as errors:
        kind.model_validate(asked)
    assert errors.value.error_count() < 10
    with pytest.raises(Refusal) as refusal:
        ask(kind, asked)
    assert refusal.value.field == field


@pytest.mark.parametrize("body", [{"prompt": "x"}, {"prompt": "x", "stream_options": {}}], ids=["request", "inner"])
def test_an_object_with_a_hundred_thousand_fields(body: Any) -> None:
    (body.get("stream_options", body)).update({f"x{number}": 1 for number in range(100_000)})
    with pytest.raises(Refusal, match="at most 1000"):
        ask(TextRequest, body)


def test_too_many_stop_texts_are_told_so() -> None:
    with pytest.raises(Refusal, match=r"stop: .* at most 16"):
        ask(TextRequest, {"prompt": "x", "stop": ["a"] * 17})
    assert ask(TextRequest, {"prompt": "x", "stop": ["a"] * 16}).stops == ["a"] * 16


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("x", 1), ([1, 2, 3], 1), (["x", "y"], 2), ([[1], [2], [3, 4]], 3), ([], 0), ([[]], 1)],
    ids=str,
)
def test_how_many_answers_are_wanted(prompt: Any, prompts: int) -> None:
    assert choices_of(ask(TextRequest, {"prompt": prompt, "n": 2})) == 2 * prompts
    assert choices_of(ask(ChatRequest, CHAT | {"n": 2})) == 2


def chat(template: str) -> str:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    made = tokenize(tokenizer, {"chat": CHAT["messages"], "most_bytes": 500})
    return tokenizer.decode(made["tokens"][0])


def test_a_template_without_developers_gets_a_system_message() -> None:
    assert chat(LEAVES_OUT) == "<system>In French.<user>Hi"
    assert chat(KNOWS) == "D:In French."
