"""The command line: one function a verb, each calling one function of the library.

Imports stand inside the verbs, so that `parscale --help` loads nothing that it does not need.
"""

import sys
from collections.abc import Callable
from typing import Any

import tyro

from parscale.errors import InputError

VERBS: dict[str, Callable[..., Any]] = {}


def main(argv: list[str] | None = None) -> int:
    """Run one verb. Returns 0; 2 with one line on stderr when the input is at fault; 130 when interrupted."""
    try:
        tyro.extras.subcommand_cli_from_dict(VERBS, prog="parscale", description=__doc__, args=argv)
    except (InputError, OSError) as error:
        print(f"parscale: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("parscale: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
