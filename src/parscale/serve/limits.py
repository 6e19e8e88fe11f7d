"""What one server gives its clients, and what one request may ask: all defaults."""

from dataclasses import dataclass, fields

from parscale.errors import InputError

TOKEN_BYTES = 16
"""Bytes of UTF-8 for each token that a prompt may have; text of people and of programs has 2 to 5."""


@dataclass(frozen=True)
class Limits:
    """What one server gives its clients, and what one request may ask.

    Args:
        max_prompt_tokens: the longest prompt. One with 16 times as many bytes is refused before it is tokenised.
        max_new_tokens: the longest answer.
        max_requests: answers being made at once, over all p; a further request gets 429.
        max_body_bytes: the largest request.
        max_prompt_seconds: for one request's chat template and tokenising; what takes longer is ended.
        cache_tokens: tokens, of all requests together, whose keys and values the cache of one p holds.

    Raises:
        InputError: a number below 1.
    """

    max_prompt_tokens: int = 8192
    max_new_tokens: int = 1024
    max_requests: int = 64
    max_body_bytes: int = 1_000_000
    max_prompt_seconds: int = 5
    cache_tokens: int = 16384

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise InputError(f"{field.name}={getattr(self, field.name)} is not accepted; give a number >= 1")
