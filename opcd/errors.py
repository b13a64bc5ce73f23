"""The one exception that a user can cause."""


class InputError(ValueError):
    """Something the user gave does not fit: what must be, what was found, what to do.

    The command line prints the message without a traceback and exits with status 2.
    """
