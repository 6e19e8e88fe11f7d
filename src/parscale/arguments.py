"""Reading the command line: tyro parses it, an error of it is one line, and the verb runs afterwards."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from functools import partial, wraps
from typing import Any

import tyro

from parscale.errors import InputError

_RULE = re.compile(r"[╭╰].*|[│ ]*(─{3,}|-{3,})[│ ]*")
_FRAME = re.compile(r"^(│ |  )|[│ ]+$")
"""Around a row; where stdout is not UTF-8 tyro draws with hyphens and spaces."""
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_START, _END = 200, 80
"""Characters that are kept of a longer message: a value may be of any length."""
_HELP, _EXPECTED = "For full helptext", "Argument helptext:"
"""How the sections of tyro's box begin that point to the help, and that tell what a flag takes."""
_DESCRIPTION_INDENT = 8


def later(verb: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the same arguments and help, which returns the call instead of making it."""

    @wraps(verb)
    def bound(*args: Any, **kwargs: Any) -> Callable[[], Any]:
        return partial(verb, *args, **kwargs)

    return bound


def parse(verbs: Mapping[str, Callable[..., Any]], arguments: Sequence[str], **options: Any) -> Callable[[], Any]:
    """The call that the arguments ask for.

    Args:
        verbs: the subcommands by name.
        arguments: the words of the command line, without the program's name.
        options: of `tyro.extras.subcommand_cli_from_dict`.

    Raises:
        InputError: the arguments are not those of a verb; one line, in place of tyro's box.
        SystemExit: help was asked for, and printed.
    """
    box = io.StringIO()
    try:
        with redirect_stderr(box):
            deferred = {name: later(verb) for name, verb in verbs.items()}
            return tyro.extras.subcommand_cli_from_dict(deferred, args=arguments, **options)
    except SystemExit as end:
        if end.code != 2:
            raise
        raise InputError(one_line(box.getvalue())) from None


def one_line(box: str) -> str:
    """What a box of tyro says, without its frame, its descriptions of flags and its pointer to the help.

    >>> one_line("╭─ Value error ─╮\\n│ Error parsing --batch: 'x' │\\n╰───╯")
    "Error parsing --batch: 'x'"
    """
    said = []
    for section in _sections(box):
        if section[0].startswith(_EXPECTED):
            said.append(f"give {section[1].strip()}")
        elif not section[0].startswith(_HELP):
            said.append(" ".join(row.strip() for row in section).removesuffix("."))
    told = "; ".join(said)
    return told if len(told) <= _START + _END else f"{told[:_START]} … {told[-_END:]}"


def _sections(box: str) -> list[list[str]]:
    """The rows of each section but the title. What follows a blank row tells causes in terms of Python."""
    sections: list[list[str]] = [[]]
    ended = False
    for line in _STYLE.sub("", box).splitlines():
        row = _FRAME.sub("", line)
        if _RULE.fullmatch(line):
            sections.append([])
            ended = False
        elif not row:
            ended = True
        elif not ended and not row.startswith(" " * _DESCRIPTION_INDENT):
            sections[-1].append(row)
    return [section for section in sections[1:] if section]
