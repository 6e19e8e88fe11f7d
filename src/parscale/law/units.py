"""Budgets as people write them: 6GiB, 40ms."""

import math

from parscale.errors import InputError

BYTES = {"b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6}


def parse_bytes(text: str | float, name: str = "memory") -> float:
    """Bytes: "6GiB", "800MB", or, where it is no text, a number of bytes."""
    return _parse(text, BYTES, name, "6GiB or 800MB")


def parse_seconds(text: str | float, name: str = "latency") -> float:
    """Seconds: "40ms", "2s", or, where it is no text, a number of seconds."""
    return _parse(text, SECONDS, name, "40ms or 2s")


def _parse(text: str | float, units: dict[str, float], name: str, example: str) -> float:
    number, unit = str(text).strip().lower(), ""
    for known in sorted(units, key=len, reverse=True):
        if number.endswith(known):
            number, unit = number.removesuffix(known).strip(), known
            break
    try:
        value = float(number) * (units[unit] if isinstance(text, str) else 1)
    except (KeyError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise InputError(f"{name} is {text!r}: a positive amount such as {example} is needed")
    return value
