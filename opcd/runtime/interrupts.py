"""How Ctrl-C and the end of a job reach a run: it finishes its step and saves, or ends in order."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

# Ctrl-C, the end of a job, and a terminal that was closed (which Windows has no signal for).
SIGNALS = [
    signal.Signals[name]
    for name in ("SIGINT", "SIGTERM", "SIGHUP")
    if name in signal.Signals.__members__
]


class Interrupts:
    """Within it a first signal is kept in `caught`; a second one does what it did before.

    Outside the main thread, where Python hands over no signals, nothing is caught.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self.caught: signal.Signals | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) == signal.SIG_IGN:  # as nohup does
                    continue
                self._handlers[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def release(self) -> None:
        """Signals are the caller's own again."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _catch(self, number: int, _frame: Any) -> None:
        self.caught = signal.Signals(number)
        self._tell("\nfinishing this step, then saving (once more to stop at once)")
        signal.signal(number, self._handlers[self.caught])


class Ended(KeyboardInterrupt):
    """A signal that would have ended the process where it stood."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Within it the end of a job and a closed terminal are raised, as Ctrl-C is.

    What was begun is then ended where Python leaves it. Outside the main thread, where Python hands
    over no signals, nothing is changed.
    """

    def end(number: int, _frame: Any) -> None:
        raise Ended(signal.Signals(number))

    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
