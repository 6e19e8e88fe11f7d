"""What a server tells Prometheus at /metrics."""

import time
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from parscale.serve.answer import Answer
from parscale.serve.engine import Engine

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("parscale_requests", "HTTP requests", ["route", "status"], registry=registry)
        self.seconds = Histogram(
            "parscale_request_seconds", "From request to last byte", ["route"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "parscale_first_token_seconds",
            "From request to first token",
            ["streams"],
            buckets=SECONDS,
            registry=registry,
        )
        self.prompt = Counter("parscale_prompt_tokens", "Tokens of prompts", ["streams"], registry=registry)
        self.generated = Counter("parscale_generated_tokens", "Tokens generated", ["streams"], registry=registry)
        running = Gauge("parscale_requests_running", "Answers being made", registry=registry)
        running.set_function(lambda: engine.running)
        scheduled = Gauge("parscale_requests_scheduled", "Requests that the batching managers hold", registry=registry)
        scheduled.set_function(engine.scheduled)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)

    def answered(self, answer: Answer) -> None:
        """Count an answer that has ended, whichever way."""
        self.prompt.labels(answer.streams).inc(answer.prompt_tokens)
        self.generated.labels(answer.streams).inc(answer.completion_tokens)
        if answer.first is not None:
            self.first_token.labels(answer.streams).observe(answer.first - answer.started)

    def counting(self, app: Any) -> Any:
        """The ASGI app with its requests counted and timed."""

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            status, started = 499, time.monotonic()  # 499: the client left before an answer

            async def watched(message: Any) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, watched)
            finally:
                # The routes are few; a path that is none of them must not become a label.
                route = getattr(scope.get("route"), "path", "none")
                self.requests.labels(route, status).inc()
                self.seconds.labels(route).observe(time.monotonic() - started)

        return counted
