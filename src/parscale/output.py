"""How a verb gives what it found: one aligned table for people, JSON for programs."""

import json
import math
import os
import select
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def json_text(value: Any) -> str:
    """`value` as indented JSON. NaN and infinities, which JSON has not, become null."""
    return json.dumps(_finite(value), indent=1, ensure_ascii=False, allow_nan=False)


def say(message: str) -> None:
    """One line on the error stream."""
    print(f"parscale: {message}", file=sys.stderr, flush=True)


def flush_output() -> None:
    """Write what stdout still holds: a reader that has gone is met here, and not when the interpreter ends."""
    if sys.stdout is not None:  # a process may be started without one
        sys.stdout.flush()


def reader_is_gone() -> bool:
    """Whether stdout or stderr is a pipe that nobody reads any more."""
    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # there is none, or one without a file, as in a notebook
            poll.register(stream.fileno(), select.POLLOUT)
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))


def drop_unwritten() -> None:
    """Leave the interpreter nothing to complain of when it ends: what cannot be written goes nowhere."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (AttributeError, ValueError):  # there is none, or it is closed
            continue


def passing_bar(auto_refresh: bool = True) -> "Progress":
    """A progress bar on the error stream that is gone when it is done; nothing where no person looks. Without
    `auto_refresh` no thread draws it: call `refresh`."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    return Progress(console=console, transient=True, disable=not console.is_terminal, auto_refresh=auto_refresh)


def print_json(value: Any) -> None:
    """`value` as `json_text` has it."""
    print(json_text(value))


def print_table(title: str, rows: list[dict[str, Any]]) -> None:
    """Rows with the same keys as a table under `title`; numbers to five significant digits."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not rows:
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name, value in rows[0].items():
        table.add_column(escape(name), justify="left" if isinstance(value, str) else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(_cell(value)) for value in row.values()))
    # Wide enough for any row: a table that is cut off or wrapped cannot be read by a pipe.
    console = Console(width=200, highlight=False)
    console.print(title, style="italic", markup=False, soft_wrap=True)  # a Table wraps its own to its width
    console.print(table)


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.5g}"
    return str(value)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
