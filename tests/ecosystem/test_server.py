"""The server before its limits: what is too long or never ends is refused, and holds up nobody."""

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra `serve` is not installed")

from parscale.serve import connection
from parscale.serve.body import HEARD
from parscale.serve.connection import READ, Pace, PacedHTTP
from parscale.serve.limits import TOKEN_BYTES, Limits
from parscale.serve.prompt import check_size
from parscale.serve.schema import ChatRequest, Refusal, TextRequest, read_request
from parscale.serve.server import _listen
from parscale.serve.tokenizing import Ended, TokenizerGone, Tokenizing
from tests.serve.processes import KEY, Server, byte_tokenizer, offline, save, serving, small_model, until

BODY = 50_000
TOKENS = 400
KERNEL = 32 << 20
"""Bytes that the kernel may hold on the way."""
RUNS_AWAY = "{{ 10 ** (10 ** (messages[0].content | length)) }}"
"""With content of eight letters."""
JSON = "Content-Type: application/json\r\n"
AUTHORIZED = f"Authorization: Bearer {KEY}\r\n"


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model()


@pytest.fixture(scope="module")
def server(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = RUNS_AWAY
    folder = save(tmp_path_factory.mktemp("served"), model, tokenizer)
    limits = ("--max-prompt-tokens", TOKENS, "--max-body-bytes", BODY, "--max-prompt-seconds", 1, "--streams", 1)
    with serving(folder, *limits) as running:
        yield running


def ask(server: Server, prompt: Any = "x") -> str:
    answer = server.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4, "temperature": 0})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def open_to(server: Server) -> socket.socket:
    host, port = server.base.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


# --- bodies without end -----------------------------------------------------------------------------------------------

PLACES = {
    "a request": ("POST /v1/completions", JSON + AUTHORIZED, 413),
    "a chat": ("POST /v1/chat/completions", JSON + AUTHORIZED, 413),
    "no key": ("POST /v1/completions", JSON, 401),
    "another type": ("POST /v1/completions", "Content-Type: text/plain\r\n" + AUTHORIZED, 415),
    "no such route": ("POST /nowhere", AUTHORIZED, 404),
    "another method": ("PUT /v1/completions", AUTHORIZED, 405),
    "a route without a body": ("GET /health", "", 200),
}
CHUNKS = {
    "in large chunks": ("Transfer-Encoding: chunked\r\n", b"4000\r\n" + b"x" * 0x4000 + b"\r\n", 0x4000),
    "in small chunks": ("Transfer-Encoding: chunked\r\n", b"1\r\nx\r\n" * 4000, 4000),
    "of a length": ("Content-Length: 1000000000000\r\n", b"x" * 0x4000, 0x4000),
}


@pytest.mark.parametrize(
    ("place", "way"),
    [
        *((place, way) for place in PLACES for way in CHUNKS if way != "in small chunks"),
        pytest.param("a request", "in small chunks", marks=pytest.mark.slow),  # they are read slowly
    ],
)
def test_an_endless_body_is_cut(place: str, way: str, server: Server) -> None:
    route, headers, status = PLACES[place]
    length, piece, size = CHUNKS[way]
    sent, heard = 0, b""
    most = HEARD * BODY + KERNEL  # what is cut later than that is not cut
    with open_to(server) as connection:
        connection.sendall(f"{route} HTTP/1.1\r\nHost: x\r\n{headers}{length}\r\n".encode())
        try:
            while sent < most:
                connection.sendall(piece)
                sent += size
        except OSError:
            pass
        try:
            while part := connection.recv(65536):
                heard += part
        except OSError:
            pass  # cut: what had not been read was answered with a reset
    assert sent < most
    if heard:
        assert int(heard.split()[1]) == status
        assert b"connection: close" in heard
    ask(server)


def test_a_body_that_is_a_little_too_large_is_heard_and_the_connection_goes_on(server: Server) -> None:
    """Most clients listen only when they have spoken."""
    connection = http.client.HTTPConnection(server.base.removeprefix("http://"), timeout=60)
    with closing(connection):
        connection.connect()
        kept = connection.sock
        for size in (BODY + 1, 2 * BODY, 4 * BODY):
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
            connection.request("POST", "/v1/completions", b"x" * size, headers)
            answer = connection.getresponse()
            assert (answer.status, answer.getheader("connection")) == (413, None)
            assert f"larger than {BODY} bytes" in answer.read().decode()
            assert connection.sock is kept


def test_a_client_that_waits_to_be_asked_for_its_body_is_not_asked_in_vain(server: Server) -> None:
    with open_to(server) as connection:
        head = f"POST /nowhere HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n{AUTHORIZED}Content-Length: 9\r\n\r\n"
        connection.sendall(head.encode())
        heard = connection.recv(65536)
    assert heard.startswith(b"HTTP/1.1 404 ")
    assert b"connection: close" in heard


def test_a_body_that_stands_still_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from parscale.serve import body

    monkeypatch.setattr(body, "SECONDS", 0.01)
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        assert (await receive())["body"] == b"{"
        with pytest.raises(Refusal) as refusal:
            await receive()
        await send({"type": "http.response.start", "status": refusal.value.status, "headers": []})

    async def receive() -> Any:
        if not sent:
            sent.append("a part")
            return {"type": "http.request", "body": b"{", "more_body": True}
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(body.BoundedBody(app, 100)({"type": "http", "headers": []}, receive, send))
    assert sent[1] == {"type": "http.response.start", "status": 408, "headers": [(b"connection", b"close")]}


# --- lengths, in bytes before anything else ---------------------------------------------------------------------------

LONG: dict[str, tuple[Any, Any]] = {
    "text": (TextRequest, {"prompt": "lorem ipsum " * 75_000}),
    "a text among others": (TextRequest, {"prompt": ["x", "é" * TOKEN_BYTES * TOKENS]}),
    "tokens": (TextRequest, {"prompt": [1, 2, 3] * 100_000}),
    "a chat": (ChatRequest, {"messages": [{"role": "user", "content": "x" * 900_000}]}),
    "many turns": (ChatRequest, {"messages": [{"role": "user", "content": "x"}] * 20_000}),
}


@pytest.mark.parametrize("kind", LONG)
def test_what_is_too_long_is_refused_by_its_bytes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its fields are looked at, and before anything is tokenised."""
    engine: Any = type("Engine", (), {"limits": Limits(max_prompt_tokens=TOKENS), "context": 2048})
    request, fields = LONG[kind]
    body = json.dumps(fields, ensure_ascii=False).encode()
    monkeypatch.setattr(request, "model_validate", lambda fields: pytest.fail("validated"))
    with pytest.raises(Refusal) as refusal:
        read_request(request, body, lambda found: check_size(found, request, len(body), engine))
    assert (refusal.value.status, refusal.value.code) == (400, "context_length_exceeded")
    assert refusal.value.field == request.prompt_field


def test_what_is_not_too_long_is_not_refused_by_its_bytes() -> None:
    engine: Any = type("Engine", (), {"limits": Limits(max_prompt_tokens=TOKENS), "context": 2048})
    for fields in (
        {"prompt": "é" * (TOKEN_BYTES * TOKENS // 2)},
        {"prompt": [1] * TOKENS},
        {"prompt": ["x"] * 9000},
        {},
    ):
        check_size(fields, TextRequest, size=900_000, engine=engine)
    check_size({"messages": 3}, ChatRequest, size=TOKEN_BYTES * TOKENS, engine=engine)


@pytest.mark.slow
def test_clients_with_long_prompts_take_little_memory(server: Server, model: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, model, byte_tokenizer())
    bodies = [json.dumps(fields) for _, fields in LONG.values()]
    with serving(folder, "--streams", 1) as one:
        ask(one)
        before = peak(one.process.pid)

        def knock(number: int) -> None:
            import httpx

            for turn in range(4):
                kind = (number + turn) % len(bodies)
                route = "/v1/completions" if kind < 3 else "/v1/chat/completions"
                headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
                answer = httpx.post(one.base + route, content=bodies[kind], headers=headers, timeout=120)
                assert answer.status_code == 400

        clients = [threading.Thread(target=knock, args=(number,)) for number in range(24)]
        for client in clients:
            client.start()
        while any(client.is_alive() for client in clients):
            assert ask(one) == offline(model, byte_tokenizer(), "x", 4, streams=1)
        assert peak(one.process.pid) - before < 150 << 20


def peak(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))


# --- reading in bulk --------------------------------------------------------------------------------------------------


def test_a_bulk_waits_and_what_is_small_does_not() -> None:
    pace, costs = Pace(), 3 * connection.CREDIT / connection.REST
    assert pace.worked(costs / 6) == 0.0  # on credit
    assert connection.CREDIT < pace.worked(costs) < 3 * connection.CREDIT
    protocol, paused = object.__new__(PacedHTTP), []
    protocol.pace, protocol.data_received = pace, lambda data: paused.append(len(data))  # type: ignore[method-assign]
    protocol.transport = type("T", (), {"is_closing": lambda: False, "pause_reading": lambda: paused.append("pause")})  # type: ignore[assignment]
    protocol.loop = type("L", (), {"call_later": lambda wait, call: paused.append(wait > 0)})  # type: ignore[assignment]
    for size in (10, READ):
        protocol.get_buffer(-1)
        protocol.buffer_updated(size)
    assert paused == [10, READ, "pause", True]


def test_answers_are_not_held_back_for_more_to_send() -> None:
    """Nagle's algorithm makes every answer on a connection that is kept wait for the client's delayed ACK."""

    async def accepted() -> int:
        found = asyncio.get_running_loop().create_future()

        def connected(reader: Any, writer: asyncio.StreamWriter) -> None:
            taken: socket.socket = writer.get_extra_info("socket")
            found.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with _listen("127.0.0.1", 0) as listening:
            async with await asyncio.start_server(connected, sock=listening):
                with socket.create_connection(listening.getsockname()):
                    return await found

    assert asyncio.run(accepted()) == 1


# --- templates and tokenisers that do not end -------------------------------------------------------------------------

ENDLESS = {
    "a power": "{{ 10**(10**8) }}",
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "memory": "{% set x = namespace(y='x' * 1000000) %}{% for a in range(9000) %}{% set x.y = x.y + x.y %}{% endfor %}",
    "a long text": "{% for a in range(99999) %}{{ 'x' * 99999 }}{% endfor %}",
    "a pattern": "{{ ('%' ~ 10**9 ~ 'd') % 1 }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_ended(kind: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = ENDLESS[kind] + "{{ messages[0].content }}"

    async def run() -> None:
        with closing(Tokenizing(tokenizer, seconds=0.5)) as tokenizing:
            for _ in range(2):
                chat, text = await asyncio.gather(
                    tokenizing({"chat": [{"role": "user", "content": "x"}], "most_bytes": 1000}),
                    tokenizing({"texts": ["Hé"]}),
                    return_exceptions=True,
                )
                assert isinstance(chat, Ended) or "refused" in chat or chat["bytes"] > 1000
                assert text == {"tokens": [tokenizer("Hé")["input_ids"]]}

    asyncio.run(run())


def test_a_request_whose_template_runs_away_is_told_so_and_others_go_on(server: Server) -> None:
    bodies = [{"messages": [{"role": "user", "content": text}], "max_tokens": 4} for text in ("runs off", "x")]
    for _ in range(2):
        answers = [server.http.post("/v1/chat/completions", json=body) for body in bodies]
        assert [answer.status_code for answer in answers] == [400, 200]
        assert answers[0].json()["error"]["param"] == "messages"
        assert "the chat template took more than 1 s" in answers[0].json()["error"]["message"]
    ask(server)


def test_without_its_tokenizer_there_is_nothing_to_answer() -> None:
    with pytest.raises(TokenizerGone):
        asyncio.run(dead())


async def dead() -> None:
    with closing(Tokenizing(byte_tokenizer(), seconds=1)) as tokenizing:
        os.kill(tokenizing._process.pid, signal.SIGKILL)
        tokenizing._process.wait()
        await tokenizing({"texts": ["x"]})


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("scheme", ["bearer", "BEARER", "bEARer"])
def test_the_name_of_the_scheme_is_taken_in_any_case(scheme: str, server: Server) -> None:
    for key, status in ((KEY, 200), ("wrong", 401)):
        headers = {"Authorization": f"{scheme} {key}"}
        assert server.http.get("/v1/models", headers=headers).status_code == status
    for sent in (KEY, f"Basic {KEY}", scheme, ""):
        assert server.http.get("/v1/models", headers={"Authorization": sent}).status_code == 401


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "code"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, -9, marks=pytest.mark.slow),
    ],
)
def test_no_process_is_left_behind(how: signal.Signals, code: int, model: Any, tmp_path: Path) -> None:
    folder = save(tmp_path, model, byte_tokenizer())
    with serving(folder, "--streams", 1) as server, open_to(server) as idle:
        ask(server)
        (child,) = children(server.process.pid)
        left = [child, *children(child)]
        assert len(left) == 2
        server.process.send_signal(how)
        assert server.process.wait(timeout=60) == code
        assert idle.recv(100) == b""
        assert until(lambda: not any(alive(pid) for pid in left), tries=100_000)


def test_a_server_whose_tokenizer_has_died_says_so_and_ends_well(server: Server) -> None:
    """The last test of this server."""
    (child,) = children(server.process.pid)
    os.kill(child, signal.SIGKILL)
    assert until(lambda: server.http.get("/health").status_code == 503)
    # Workers that are there go on; one that is needed anew cannot be had.
    body = {"messages": [{"role": "user", "content": "x" * 10_000}]}
    assert server.http.post("/v1/chat/completions", json=body).status_code == 503
    assert server.stop()[0] == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
