"""The one exception that a user can cause."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the user gave does not fit: what must be, what was found, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint at the nearest known name; "" where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""
