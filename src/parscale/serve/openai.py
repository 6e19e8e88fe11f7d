"""OpenAI's HTTP interface over an `Engine`: the routes, who may ask, and every way in which a request is refused.

transformers' own server (`transformers serve`) is not built upon: a route of it loads any model it is told to, and its
continuous batching samples every request as the first one asked. Its batching manager is (engine.py).
"""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from parscale.errors import InputError
from parscale.serve.answer import Answer
from parscale.serve.body import Bodies, BoundedBody
from parscale.serve.connection import READ, PacedHTTP
from parscale.serve.engine import Engine, EngineDead
from parscale.serve.metrics import Metrics
from parscale.serve.prompt import check_size, choices_of, new_tokens, prompts_of, samplings_of
from parscale.serve.schema import ChatRequest, CompletionOptions, Kind, Refusal, TextRequest, read_request
from parscale.serve.tokenizing import TokenizerGone, Tokenizing
from parscale.serve.wire import ChatWire, TextWire, Wire, error_object

Value = TypeVar("Value")


def build_app(
    engine: Engine,
    tokenizing: Tokenizing,
    name: str,
    api_key: str | None = None,
    ready: Callable[[], None] = lambda: None,
    hosts: Sequence[str] = ("*",),
) -> Callable[..., Awaitable[None]]:
    """The ASGI app.

    Args:
        engine: open, at least for the p of requests that name none.
        tokenizing: open, with the model's tokenizer.
        name: of the model; a request that names another gets 404.
        api_key: what clients must send as `Authorization: Bearer ...`, on every route but /health.
        ready: called once requests can be answered.
        hosts: names of this server; a request for another, by its `Host`, gets 400. "*" stands for all.
    """
    server = _Server(engine, tokenizing, name)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        ready()
        yield

    bearer = HTTPBearer(auto_error=False)

    async def authorized(request: Request) -> None:
        if api_key is None:
            return
        sent = await bearer(request)  # the scheme in any case, as RFC 7235 has it
        if sent is None or not hmac.compare_digest(sent.credentials.strip().encode("latin-1"), api_key.encode()):
            raise Refusal(401, "the API key is missing or wrong", code="invalid_api_key")

    # FastAPI's own pages about the interface would load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False)
    guarded = APIRouter(dependencies=[Depends(authorized)])
    app.get("/health")(server.health)
    guarded.get("/metrics")(server.metrics_text)
    guarded.get("/v1/models")(server.models)
    guarded.get("/v1/models/{model:path}")(server.one_model)
    guarded.post("/v1/chat/completions")(server.chat)
    guarded.post("/v1/completions")(server.completions)
    app.include_router(guarded)
    for kind in (Refusal, HTTPException, EngineDead, TokenizerGone, ClientDisconnect, Exception):
        app.add_exception_handler(kind, _refused)
    return server.metrics.counting(BoundedBody(app, engine.limits.max_body_bytes))


class _Server:
    """The routes."""

    def __init__(self, engine: Engine, tokenizing: Tokenizing, name: str) -> None:
        self.engine, self.tokenizing, self.name = engine, tokenizing, name
        self.bodies = Bodies(engine.limits.max_body_bytes)
        self.metrics = Metrics(engine)
        self.model = {
            "id": name, "object": "model", "created": int(time.time()), "owned_by": "parscale",
            "streams": engine.trained, "max_model_len": engine.context,
        }  # fmt: skip

    async def health(self) -> Response:
        alive = self.engine.alive and self.tokenizing.alive
        return JSONResponse({"status": "ok" if alive else "the engine has stopped"}, status_code=200 if alive else 503)

    async def metrics_text(self) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def models(self) -> Response:
        return JSONResponse({"object": "list", "data": [self.model]})

    async def one_model(self, model: str) -> Response:
        self._check_name(model)
        return JSONResponse(self.model)

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, ChatRequest, ChatWire)

    async def completions(self, request: Request) -> Response:
        return await self._complete(request, TextRequest, TextWire)

    async def _complete(self, request: Request, kind: type[CompletionOptions], wire: type[Wire]) -> Response:
        asked = self._read(kind, await self.bodies.read(request))
        if asked.model:
            self._check_name(asked.model)
        streams = asked.streams or self.engine.streams
        if streams > self.engine.trained:
            raise Refusal(400, f"streams={streams}: this model has {self.engine.trained}", field="streams")
        choices = choices_of(asked)
        self._check_places(asked, choices)
        prompts = await prompts_of(asked, self.engine, self.tokenizing)
        await self.engine.manager(streams)
        self._check_places(asked, choices)  # again: others were let in meanwhile
        # From here to the answer's `close` nothing may be awaited outside of the `try` that closes it.
        answer = Answer(
            self.engine,
            prompts,
            n=asked.n,
            streams=streams,
            new_tokens=new_tokens(asked, prompts, self.engine),
            samplings=samplings_of(asked, choices),
            stops=asked.stops,
            each_token=asked.stream,
        )
        told = wire(self.name, answer)
        if asked.stream:
            return _Events(told.events(asked.stream_options.include_usage), lambda: self._end(answer))
        try:
            return JSONResponse(told.whole(await _unless_gone(request, answer.whole())))
        finally:
            self._end(answer)

    def _read(self, kind: type[Kind], body: bytes) -> Kind:
        start = time.thread_time()
        try:
            return read_request(kind, body, lambda fields: check_size(fields, kind, len(body), self.engine))
        finally:
            if len(body) > READ:
                PacedHTTP.pace.worked(time.thread_time() - start)

    def _end(self, answer: Answer) -> None:
        answer.close()
        self.metrics.answered(answer)

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise Refusal(
                404, f"the model {name!r} is not served here; {self.name!r} is", field="model", code="model_not_found"
            )

    def _check_places(self, asked: CompletionOptions, wanted: int) -> None:
        places = self.engine.limits.max_requests
        if wanted > places:
            field = "n" if asked.n > 1 else asked.prompt_field
            raise Refusal(400, f"{wanted} answers in one request; at most {places} are made at once", field=field)
        if self.engine.running + wanted > places:
            raise Refusal(429, f"{places} answers are being made, try again later", code="rate_limit_exceeded")


class _Events(StreamingResponse):
    """Server-sent events. `end` is called also when the client leaves before the first one is made."""

    def __init__(self, events: AsyncIterator[str], end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self.end = end

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


async def _unless_gone(request: Request, work: Awaitable[Value]) -> Value:
    """What `work` gives; it is cancelled when the client leaves before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, Refusal):
        status, told = error.status, error_object(error.message, error.status, error.field, error.code)
    elif isinstance(error, HTTPException):
        status, told = error.status_code, error_object(str(error.detail), error.status_code)
    elif isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    elif isinstance(error, EngineDead | TokenizerGone | InputError):  # of another p, whose cache finds no memory
        status, told = 503, error_object(str(error), 503)
    else:
        status, told = 500, error_object("the server failed; its log says why", 500)
    return JSONResponse({"error": told}, status_code=status, headers={"retry-after": "1"} if status == 429 else None)
