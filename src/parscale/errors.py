"""The one error a user meets: a single line that names the thing, the value and what would be accepted."""


class InputError(ValueError):
    """What was asked for cannot be done. `str(error)` is one line; the CLI prints it and exits with status 2."""
