"""Output that arrives on any terminal, and never ends a run."""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

SPELLED = {
    "✓": "+",
    "✗": "-",
    "→": "->",
    "–": "-",
    "…": "...",
    "·": "*",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "‖": "||",
}


@contextlib.contextmanager
def any_console() -> Iterator[None]:
    """Within it, signs that stdout and stderr cannot encode are spelled, and a reader that has gone
    is no error."""
    codecs.register_error("spelled", _spelled)
    streams = sys.stdout, sys.stderr
    patient = [_Patient(stream) if stream else stream for stream in streams]
    try:
        sys.stdout, sys.stderr = patient
        yield
    finally:
        sys.stdout, sys.stderr = streams
        for stream in filter(None, patient):
            stream.end()


class _Patient:
    """A text stream that drops what can no longer be written: its reader or terminal is gone."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._gone = False
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="spelled")

    def write(self, text: str) -> int:
        """Write, or drop."""
        if not self._gone:
            try:
                self._stream.write(text)
            except OSError:
                self._gone = True
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        if not self._gone:
            try:
                self._stream.flush()
            except OSError:
                self._gone = True

    def end(self) -> None:
        """What is left goes out, or nowhere: the interpreter, which flushes as it ends, would
        replace the exit status."""
        self.flush()
        if self._gone:
            with contextlib.suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """A codec's error handler: well-known signs in ASCII, others by their code."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(SPELLED.get(c) or f"\\u{ord(c):04x}" for c in text), error.end
