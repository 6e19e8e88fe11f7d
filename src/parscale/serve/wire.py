"""How an answer looks on the wire: OpenAI's JSON objects and events of the two completion routes, and its errors."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any, ClassVar

from parscale.serve.answer import Answer, Piece
from parscale.serve.engine import EngineDead


class Wire:
    """An `Answer` as one JSON object, or as events (server-sent, one `data:` line each).

    Args:
        model: the name to show.
        answer: being made.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    event_kind: ClassVar[str]

    def __init__(self, model: str, answer: Answer) -> None:
        self.answer = answer
        self.head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model,
            "streams": answer.streams,
        }  # fmt: skip

    def whole(self, pieces: list[Piece]) -> dict[str, Any]:
        """The JSON object of choices that have ended."""
        choices = [self._choice(piece) for piece in pieces]
        return self.head | {"object": self.kind, "choices": choices, "usage": self._usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[str]:
        """The events, the last one being `[DONE]`, or an error when the engine dies."""
        try:
            for opening in self._openings():
                yield self._event([opening])
            async for piece in self.answer.pieces():
                yield self._event([self._delta(piece)])
        except EngineDead as error:
            yield _data({"error": error_object(str(error), 500)})
            return
        if include_usage:
            yield self._event([], usage=self._usage())
        yield "data: [DONE]\n\n"

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return _data(self.head | {"object": self.event_kind, "choices": choices} | more)

    def _usage(self) -> dict[str, int]:
        prompt, completion = self.answer.prompt_tokens, self.answer.completion_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

    def _openings(self) -> list[dict[str, Any]]:
        return []

    def _choice(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError

    def _delta(self, piece: Piece) -> dict[str, Any]:
        raise NotImplementedError


class ChatWire(Wire):
    """`/v1/chat/completions`."""

    prefix, kind, event_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _openings(self) -> list[dict[str, Any]]:
        start = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [{"index": choice} | start for choice in range(self.answer.choices)]

    def _choice(self, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.choice, "message": message, "logprobs": None, "finish_reason": piece.finish}

    def _delta(self, piece: Piece) -> dict[str, Any]:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.choice, "delta": delta, "logprobs": None, "finish_reason": piece.finish}


class TextWire(Wire):
    """`/v1/completions`."""

    prefix, kind, event_kind = "cmpl", "text_completion", "text_completion"

    def _choice(self, piece: Piece) -> dict[str, Any]:
        return {"index": piece.choice, "text": piece.text, "logprobs": None, "finish_reason": piece.finish}

    _delta = _choice


def error_object(message: str, status: int, field: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
    return {"message": message, "type": "server_error" if status >= 500 else kind, "param": field, "code": code}


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
