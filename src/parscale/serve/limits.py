"""What one server gives its clients, and what one request may ask: all defaults."""

from dataclasses import dataclass, fields

from parscale.errors import InputError


@dataclass(frozen=True)
class Limits:
    """What one server gives its clients, and what one request may ask.

    Args:
        max_prompt_tokens: the longest prompt.
        max_new_tokens: the longest answer.
        max_requests: answers being made at once, over all p; a further request gets 429.
        max_body_bytes: the largest request.
        cache_tokens: tokens, of all requests together, whose keys and values the cache of one p holds.

    Raises:
        InputError: a number below 1.
    """

    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024
    max_requests: int = 64
    max_body_bytes: int = 1_000_000
    cache_tokens: int = 16384

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name}={getattr(self, field.name)} is not accepted; give a number >= 1")
