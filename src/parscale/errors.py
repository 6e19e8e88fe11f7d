"""The one error a user meets: a single line that names the thing, the value and what would be accepted."""


class InputError(ValueError):
    """What was asked for cannot be done. `str(error)` is one line; the CLI prints it and exits with status 2."""


def first_line(error: Exception) -> str:
    """What an error says first: later lines are advice for the developers of other libraries."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
