"""The bodies of requests: bounded in bytes, alone and together, and in time; and what nobody wants to read is cut."""

import asyncio
from typing import Any

from starlette.requests import Request

from parscale.serve.schema import Refusal

SECONDS = 60
"""In which a body must have come."""

HEARD = 16
"""Times the largest body: so much of a refused one is heard, as most clients listen only when they have spoken."""

HEARING = 5
"""Seconds for which it is heard."""

TOGETHER = 64
"""Times the largest body: so many bytes of all requests that are being read are held."""


class Bodies:
    """Reads the bodies of one server's requests.

    Args:
        limit: bytes of the largest one.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self._held = limit, 0

    async def read(self, request: Request) -> bytes:
        """One request's body.

        Raises:
            Refusal: it is not JSON by its type, larger than the limit, or too many are being read.
            ClientDisconnect: the client has gone.
        """
        # Any page in a browser may send text/plain to this machine; application/json only where it is allowed.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "the Content-Type must be application/json")
        body = bytearray()
        try:
            async for part in request.stream():
                body += part
                self._held += len(part)
                if len(body) > self.limit:
                    raise Refusal(413, f"the body is larger than {self.limit} bytes")
                if self._held > TOGETHER * self.limit:
                    raise Refusal(429, "too many requests are being read, try again later", code="rate_limit_exceeded")
            return bytes(body)
        finally:
            self._held -= len(body)


class BoundedBody:
    """The ASGI app; a connection whose request was answered before its body ended is closed, not read for ever.

    Args:
        app: raises what `receive` raises: a `Refusal` where the body does not end in time.
        limit: bytes of the largest body that is taken.
    """

    def __init__(self, app: Any, limit: int) -> None:
        self.app, self.limit = app, limit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = _Body(scope, receive, HEARD * self.limit)

        async def answer(message: Any) -> None:
            if message["type"] == "http.response.start" and not await body.heard():
                message = message | {"headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        await self.app(scope, body.receive, answer)


class _Body:
    """The body of one request while it comes."""

    def __init__(self, scope: Any, receive: Any, most: int) -> None:
        self._receive, self._most = receive, most
        self._until = asyncio.get_running_loop().time() + SECONDS
        self._taken, self._ended = 0, False
        # Such a client sends nothing before it is asked to, and reading asks it.
        self._waits = any(name == b"expect" for name, _ in scope["headers"])

    async def receive(self) -> Any:
        if self._ended:
            return await self._receive()
        try:
            async with asyncio.timeout_at(self._until):
                message = await self._receive()
        except TimeoutError:
            raise Refusal(408, f"the body did not end within {SECONDS} s") from None
        self._taken += len(message.get("body", b""))
        self._ended = message["type"] != "http.request" or not message.get("more_body", False)
        return message

    async def heard(self) -> bool:
        """Whether all of the body has come, or comes now within its limits; it is thrown away."""
        if self._waits and not self._taken:
            return self._ended
        self._until = min(self._until, asyncio.get_running_loop().time() + HEARING)
        try:
            while not self._ended and self._taken <= self._most:
                await self.receive()
        except Refusal:
            return False
        return self._ended
