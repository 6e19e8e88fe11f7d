"""The server as its clients meet it: a process of its own, OpenAI's own Python client, and plain HTTP."""

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serve.processes import CHAT, KEY, TEMPLATED, Server, offline, serving, until

openai = pytest.importorskip("openai")

PROMPTS = ("def main(", "Hé", "0123456789" * 12, "x", "import os\nimport sys\n")
NEW = 24
PLACES = 6


@pytest.fixture(scope="module")
def server(folder: Any) -> Iterator[Server]:
    limits = ("--max-requests", PLACES, "--max-prompt-tokens", 400, "--max-new-tokens", 1500, "--max-body-bytes", 50000)
    with serving(folder, *limits) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    with server.client() as made:
        yield made


def complete(client: Any, server: Server, prompt: Any, **options: Any) -> Any:
    return client.completions.create(
        **{"model": server.model, "prompt": prompt, "max_tokens": NEW, "temperature": 0} | options
    )


@pytest.mark.parametrize("streams", [1, 4])
def test_greedy_answers_are_those_of_the_model_alone(
    streams: int, client: Any, server: Server, model: Any, tokenizer: Any
) -> None:
    """At once, so that the prompts share their batches with each other."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        asked = [pool.submit(complete, client, server, prompt, extra_body={"streams": streams}) for prompt in PROMPTS]
        answers = [one.result() for one in asked]
    assert [answer.choices[0].text for answer in answers] == [
        offline(model, tokenizer, prompt, NEW, streams) for prompt in PROMPTS
    ]
    assert {answer.streams for answer in answers} == {streams}


def test_several_prompts_and_tokens_in_one_request(client: Any, server: Server, tokenizer: Any) -> None:
    alone = [complete(client, server, prompt).choices[0].text for prompt in PROMPTS[:3]]
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:3]]
    assert [choice.text for choice in complete(client, server, list(PROMPTS[:3])).choices] == alone
    assert [choice.text for choice in complete(client, server, ids).choices] == alone
    assert complete(client, server, ids[0]).choices[0].text == alone[0]
    twice = complete(client, server, list(PROMPTS[:2]), n=2)
    assert [choice.text for choice in twice.choices] == [alone[0], alone[0], alone[1], alone[1]]
    assert [choice.index for choice in twice.choices] == [0, 1, 2, 3]


def test_a_prompt_is_counted_once_however_many_answers_it_has(client: Any, server: Server, tokenizer: Any) -> None:
    length = sum(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS[:2])
    before = server.metric("parscale_prompt_tokens_total")
    usage = complete(client, server, list(PROMPTS[:2]), n=3).usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (length, 2 * 3 * NEW)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert server.metric("parscale_prompt_tokens_total") == before + length
    events = complete(client, server, list(PROMPTS[:2]), n=3, stream=True, stream_options={"include_usage": True})
    assert list(events)[-1].usage == usage


@pytest.mark.parametrize(
    "options", [{}, {"n": 3}, {"temperature": 1.5, "seed": 7, "n": 2}, {"stop": ["a", "e"]}], ids=str
)
def test_a_stream_adds_up_to_the_answer(options: Any, client: Any, server: Server) -> None:
    options = {"model": server.model, "messages": CHAT, "max_tokens": NEW, "temperature": 0} | options
    whole = client.chat.completions.create(**options)
    texts, finishes = ["" for _ in whole.choices], [None for _ in whole.choices]
    events = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    for event in events:
        for choice in event.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes[choice.index] = choice.finish_reason or finishes[choice.index]
    assert texts == [choice.message.content for choice in whole.choices]
    assert finishes == [choice.finish_reason for choice in whole.choices]
    assert events[-1].usage == whole.usage
    assert events[-1].choices == []
    assert len(events) > len(whole.choices) * 3


def test_the_chat_template_is_applied(client: Any, server: Server, model: Any, tokenizer: Any) -> None:
    answer = client.chat.completions.create(model=server.model, messages=CHAT, max_completion_tokens=NEW, temperature=0)
    assert answer.choices[0].message.content == offline(model, tokenizer, TEMPLATED, NEW, streams=4)
    assert answer.usage.prompt_tokens == len(tokenizer(TEMPLATED)["input_ids"])
    assert answer.usage.completion_tokens == NEW
    assert answer.choices[0].finish_reason == "length"


def test_a_stop_text_ends_the_answer_and_is_not_in_it(client: Any, server: Server) -> None:
    text = complete(client, server, "def main(").choices[0].text
    stop = text[5:7]
    answer = complete(client, server, "def main(", stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < NEW


def test_a_seed_draws_the_same_whoever_else_is_served(client: Any, server: Server) -> None:
    def draw(seed: int) -> str:
        return complete(client, server, "x", temperature=1, top_p=0.9, seed=seed).choices[0].text

    alone = [draw(seed) for seed in range(4)]
    assert len(set(alone)) == 4
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(draw, range(4))) == alone
    without = {complete(client, server, "x", temperature=1).choices[0].text for _ in range(2)}
    assert len(without) == 2


def test_a_top_p_of_0_is_greedy(client: Any, server: Server) -> None:
    greedy = complete(client, server, "x").choices[0].text
    for top_p in (0, 1e-46):
        assert complete(client, server, "x", temperature=1, top_p=top_p).choices[0].text == greedy


def test_the_model_is_listed_and_no_other_is_served(client: Any, server: Server) -> None:
    (listed,) = client.models.list().data
    assert (listed.id, listed.streams, listed.max_model_len) == (server.model, 4, 2048)
    assert client.models.retrieve(server.model).id == server.model
    with pytest.raises(openai.NotFoundError) as error:
        client.chat.completions.create(model="gpt-4", messages=CHAT)
    assert error.value.body["param"] == "model"
    assert error.value.body["code"] == "model_not_found"
    for route in ("/load_model", "/reset", "/v1/responses", "/docs", "/openapi.json"):
        answer = server.http.post(route, json={"model": "gpt2"})
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("key", ["", "sk-a-secret-and-more", "wrong", "sk-\u00e9"])
def test_without_the_key_nothing_is_told(key: str, server: Server) -> None:
    headers = {"Authorization": f"Bearer {key}".encode()} if key else {"Authorization": ""}
    for route in ("/v1/models", "/metrics"):
        assert server.http.get(route, headers=headers).status_code == 401
    answer = server.http.post("/v1/completions", headers=headers, content=b"not even JSON")
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert server.http.get("/health", headers=headers).json() == {"status": "ok"}


BAD: list[tuple[Any, str | None]] = [
    (b"", None), (b"{", None), (b"[]", None), (b"\xff\xfe", None), (b"[" * 40000, None), (b'"text"', None),
    (b'{"prompt": "\\ud800"}', None), (b'{"prompt": "x", "temperature": NaN}', None),
    ({}, "prompt"), ({"prompt": ""}, "prompt"), ({"prompt": []}, "prompt"), ({"prompt": ["x", ""]}, "prompt"),
    ({"prompt": 3}, "prompt"), ({"prompt": [3.5]}, "prompt[0]"), ({"prompt": [258]}, "prompt"),
    ({"prompt": [-1]}, "prompt"), ({"prompt": [True]}, "prompt[0]"),
    ({"prompt": [[1], "x"]}, "prompt[0]"), ({"prompt": [2**70]}, "prompt"), ({"prompt": "x" * 401}, "prompt"),
    ({"prompt": "x", "max_tokens": 0}, "max_tokens"), ({"prompt": "x", "max_tokens": 1501}, "max_tokens"),
    ({"prompt": "x", "max_tokens": "many"}, "max_tokens"), ({"prompt": "x", "max_tokens": True}, "max_tokens"),
    ({"prompt": "x", "temperature": 3}, "temperature"), ({"prompt": "x", "temperature": "0"}, "temperature"),
    ({"prompt": ["x"] * (PLACES + 1)}, "prompt"),
    ({"prompt": "x", "top_p": -0.1}, "top_p"), ({"prompt": "x", "n": 0}, "n"), ({"prompt": "x", "n": PLACES + 1}, "n"),
    ({"prompt": "x", "seed": 2**64}, "seed"), ({"prompt": "x", "stop": ""}, "stop"),
    ({"prompt": "x", "stop": [1]}, "stop[0]"), ({"prompt": "x", "stop": ["a"] * 17}, "stop"),
    ({"prompt": "x", "streams": 5}, "streams"), ({"prompt": "x", "streams": 0}, "streams"),
    ({"prompt": "x", "streams": "2"}, "streams"), ({"prompt": "x", "stream": "yes"}, "stream"),
    ({"prompt": "x", "logprobs": 0}, "logprobs"), ({"prompt": "x", "echo": True}, "echo"),
    ({"prompt": "x", "best_of": 2}, "best_of"), ({"prompt": "x", "temprature": 0}, "temprature"),
    ({"prompt": "x", "model": 7}, "model"), ({"prompt": "x", "messages": []}, "messages"),
]  # fmt: skip
BAD_CHATS: list[tuple[Any, str | None]] = [
    ({}, "messages"), ({"messages": []}, "messages"), ({"messages": "hello"}, "messages"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"), ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [CHAT[0], {"role": "god", "content": "x"}]}, "messages[1].role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages"), ({"messages": CHAT, "tools": [{}]}, "tools"),
    ({"messages": CHAT, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": CHAT, "logprobs": True}, "logprobs"),
    ({"messages": CHAT, "max_completion_tokens": 2000}, "max_completion_tokens"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("route", "body", "field"),
    [("/v1/completions", *case) for case in BAD] + [("/v1/chat/completions", *case) for case in BAD_CHATS],
    ids=lambda value: repr(value)[:40],
)
def test_a_bad_request_is_told_its_field(route: str, body: Any, field: str | None, server: Server) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.http.post(route, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == field
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_too_many_prompts_are_refused_before_they_are_read(server: Server) -> None:
    """Else these were refused for holding no tokens."""
    answer = server.http.post("/v1/completions", json={"prompt": [""] * PLACES, "n": 2})
    assert answer.status_code == 400
    assert f"{2 * PLACES} answers in one request" in answer.json()["error"]["message"]


def test_what_only_describes_the_caller_or_means_nothing_is_taken(client: Any, server: Server) -> None:
    plain = complete(client, server, "x").choices[0].text
    described = complete(
        client, server, "x", user="me", frequency_penalty=0, presence_penalty=0.0, logit_bias={}, echo=False,
        extra_body={"logprobs": None, "suffix": None},
    )  # fmt: skip
    assert described.choices[0].text == plain


def test_bodies_that_are_too_large_or_not_json(server: Server) -> None:
    for size in (50_001, 400_000):
        answer = server.http.post("/v1/completions", json={"prompt": "x" * size})
        assert (answer.status_code, answer.json()["error"]["param"]) == (413, None)
    answer = server.http.post("/v1/completions", data={"prompt": "x"})
    assert answer.status_code == 415
    assert server.http.get("/v1/completions").status_code == 405


def test_too_many_at_once_are_told_to_come_back(client: Any, server: Server) -> None:
    running = [complete(client, server, "x", max_tokens=1500, stream=True) for _ in range(PLACES - 1)]
    for stream in running:
        next(iter(stream))
    with pytest.raises(openai.RateLimitError) as error:
        complete(client, server, "x", n=2)
    assert error.value.response.headers["retry-after"] == "1"
    assert error.value.body["code"] == "rate_limit_exceeded"
    complete(client, server, "x", max_tokens=1)
    for stream in running:
        stream.close()
    assert until(lambda: idle(server))
    complete(client, server, "x", n=PLACES)


def test_clients_that_leave_free_their_places(client: Any, server: Server) -> None:
    before = server.metric("parscale_requests_total", route="/v1/completions")
    for number in range(PLACES):
        leave(server, stream=number % 2 == 0)
    assert until(lambda: server.metric("parscale_requests_total", route="/v1/completions") == before + PLACES)
    assert until(lambda: idle(server))
    made = server.metric("parscale_generated_tokens_total")
    assert made < before + PLACES * 1500
    complete(client, server, "x", n=PLACES)


def idle(server: Server) -> bool:
    return server.metric("parscale_requests_running") == 0 and server.metric("parscale_requests_scheduled") == 0


def leave(server: Server, stream: bool, wait: bool = True) -> None:
    """Ask for a long answer and hang up, in the middle of it or, without a stream, while it is being made."""
    host, port = server.base.removeprefix("http://").split(":")
    body = json.dumps({"prompt": "x", "max_tokens": 1500, "temperature": 0, "stream": stream}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(
            f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        if stream and wait:
            assert connection.recv(64)
        elif wait:
            assert until(lambda: server.metric("parscale_requests_running") >= 1)


def test_what_was_done_is_counted(client: Any, server: Server) -> None:
    before = [server.metric(f"parscale_{name}_tokens_total", streams="2") for name in ("prompt", "generated")]
    complete(client, server, [1, 2, 3], max_tokens=5, extra_body={"streams": 2})
    assert server.metric("parscale_prompt_tokens_total", streams="2") == before[0] + 3
    assert server.metric("parscale_generated_tokens_total", streams="2") == before[1] + 5
    assert server.metric("parscale_first_token_seconds_count", streams="2") >= 1
    assert server.metric("parscale_request_seconds_count", route="/v1/completions") > 0
    server.http.get("/nowhere/at/all")
    assert server.metric("parscale_requests_total", route="none", status="404") >= 1


OWN = ["127.0.0.1", "127.0.0.1:8000", "localhost", "LOCALHOST:8000", "[::1]", "[::1]:8000"]
OTHERS = [
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example:8000",
    "[::2]:8000",
    "",
]


def test_without_a_key_it_has_no_other_name(folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page whose name points at this machine is of the same origin to a browser; only the `Host` tells."""
    monkeypatch.delenv("PARSCALE_API_KEY", raising=False)
    body = {"prompt": "x", "max_tokens": 1}
    with serving(folder, "--streams", 1, key=None) as server, server.client(api_key="none") as client:
        assert complete(client, server, "x", max_tokens=2).usage.completion_tokens == 2
        for host, status in [(host, 200) for host in OWN] + [(host, 400) for host in OTHERS]:
            assert server.http.get("/v1/models", headers={"Host": host}).status_code == status, host
            assert server.http.post("/v1/completions", headers={"Host": host}, json=body).status_code == status, host


def test_with_a_key_it_has_any_name(server: Server) -> None:
    """That of a proxy, for one."""
    for host in OWN + OTHERS[:2]:
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200, host


def test_sigterm_lets_answers_finish(folder: Any, model: Any, tokenizer: Any) -> None:
    with serving(folder, "--streams", 1) as server, server.client() as client:
        stream = iter(complete(client, server, "x", max_tokens=300, stream=True))
        text = next(stream).choices[0].text
        with ThreadPoolExecutor(1) as pool:
            stopped = pool.submit(server.stop)
            text += "".join(event.choices[0].text for event in stream)
            assert stopped.result() == (0, "")
        assert text == offline(model, tokenizer, "x", 300, streams=1)


@pytest.mark.slow
def test_fuzzed_bodies_never_crash_it(server: Server) -> None:
    """500 bodies: valid ones with a value, a type or some bytes changed."""
    import random

    draw = random.Random(0)
    values = [
        None,
        True,
        0,
        -1,
        1e308,
        2**63,
        "",
        "x",
        "\u0000",
        [],
        [[]],
        {},
        {"a": {"b": []}},
        "é" * 3000,
        ["x"] * 100,
    ]
    seen = set()
    for number in range(500):
        chat = number % 2 == 0
        body: Any = {"messages": CHAT} if chat else {"prompt": "x"}
        body |= {"max_tokens": 2, "temperature": 0.5, "top_p": 0.5, "seed": 1, "n": 1, "stop": ["a"], "streams": 1}
        for _ in range(draw.randint(1, 3)):
            body[draw.choice([*body, "stream", "logprobs", "stream_options", "model"])] = draw.choice(values)
        content = bytearray(json.dumps(body).encode())
        for _ in range(draw.choice([0, 0, 1, 5])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        route = "/v1/chat/completions" if chat else "/v1/completions"
        answer = server.http.post(route, content=bytes(content), headers={"content-type": "application/json"})
        assert answer.status_code in (200, 400, 404, 413), (content, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        seen.add(answer.status_code)
    assert {200, 400} <= seen
    assert until(lambda: idle(server))
    assert server.process.poll() is None
    assert server.http.get("/health").status_code == 200


@pytest.mark.slow
def test_200_dropped_connections_leak_nothing(client: Any, server: Server, model: Any, tokenizer: Any) -> None:
    before = server.metric("parscale_requests_total", route="/v1/completions")
    with ThreadPoolExecutor(PLACES + 2) as pool:
        left = [pool.submit(leave, server, stream=number % 2 == 0, wait=number % 4 == 0) for number in range(200)]
        for one in left:
            one.result()
    assert until(lambda: server.metric("parscale_requests_total", route="/v1/completions") == before + 200)
    assert until(lambda: idle(server))
    assert complete(client, server, "x").choices[0].text == offline(model, tokenizer, "x", NEW, streams=4)
    assert len(complete(client, server, "x", n=PLACES).choices) == PLACES
