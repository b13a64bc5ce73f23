"""Processes that answer questions, a JSON line each, every one within a time limit.

A user's code runs there: it may raise, hang, crash, print, or start processes of its own. What it
was asked is then lost, and the process is replaced.
"""

import faulthandler
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import opcd
from opcd.errors import InputError
from opcd.runtime.processes import kill_with_children

START_SECONDS = 120.0  # in which a user's module must be imported
OVER_TIME, CRASHED, RAISED = "over the time limit", "crashed", "raised"

Answering = Callable[[dict[str, Any]], dict[str, Any]]  # raises InputError for what goes wrong


class Lost(NamedTuple):
    """What was asked and got no answer, and why."""

    why: str  # OVER_TIME, CRASHED or RAISED
    detail: str = ""  # what was raised, which may quote what was asked

    def __str__(self) -> str:
        return f"{self.why}: {self.detail}" if self.detail else self.why


Answer = dict[str, Any] | Lost


class Workers:
    """Processes of ``python -m MODULE ARGUMENTS SECONDS``, one a core; a context manager.

    The module calls `serve`. A worker that hangs or crashes is replaced. Entering raises InputError
    for a module that says it cannot be used.
    """

    def __init__(
        self, module: str, arguments: Sequence[str], seconds: float, count: int | None = None
    ) -> None:
        command = [sys.executable, "-m", module, *arguments, str(seconds)]
        what = " ".join(arguments)
        self._workers = [_Worker(command, what, seconds) for _ in range(count or usable_cores())]

    def __enter__(self) -> "Workers":
        try:
            with self._threads() as threads:
                list(threads.map(_Worker.start, self._workers))
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
        for worker in self._workers:
            worker.close()

    def ask(self, asked: Sequence[Mapping[str, Any]]) -> list[Answer]:
        """The answers, in order; each question goes to whoever is free."""
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def by_a_free_one(it: Mapping[str, Any]) -> Answer:
            worker = free.get()
            try:
                return worker.ask(it)
            finally:
                free.put(worker)

        with self._threads() as threads:
            return list(threads.map(by_a_free_one, asked))

    def ask_same(self, asked: Sequence[Mapping[str, Any]], who: Sequence[int]) -> list[Answer]:
        """The answers, in order; questions of the same number go to the same process, which may
        know from the one before what it needs for the next."""
        count = len(self._workers)
        found: dict[int, Answer] = {}

        def by(number: int) -> None:
            for i, of in enumerate(who):
                if of % count == number:
                    found[i] = self._workers[number].ask(asked[i])

        with self._threads() as threads:
            list(threads.map(by, range(count)))
        return [found[i] for i in range(len(asked))]

    def _threads(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(len(self._workers))


class _Worker:
    """One process; a new one where it ended."""

    def __init__(self, command: list[str], what: str, seconds: float) -> None:
        self._command, self._what, self._seconds = command, what, seconds
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Have a process that is ready. Raises InputError where it says that it cannot be."""
        if self._process is not None:
            return
        root = str(Path(opcd.__file__).parent.parent)
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # Ctrl-C is for the process that asks
        )
        line = self._read(START_SECONDS)
        if not line:
            raise InputError(
                f"{self._what} must be loaded within {START_SECONDS:.0f} seconds, but its process "
                f"was lost ({self._end()}); import it by itself to see why"
            )
        said = json.loads(line)
        if "error" in said:
            self.close()
            raise InputError(said["error"])

    def ask(self, asked: Mapping[str, Any]) -> Answer:
        """What it says."""
        self.start()
        line = self._read(self._seconds, json.dumps(asked) + "\n")
        if not line:
            return Lost(self._end())
        said: dict[str, Any] = json.loads(line)
        return Lost(RAISED, said["error"]) if "error" in said else said

    def close(self) -> None:
        """End the process, and those that it has started."""
        if self._process is not None:
            kill_with_children(self._process)
            self._process.communicate()
            self._process = None

    def _read(self, seconds: float, line: str = "") -> str:
        """What the process answers to a line; "" where it has ended, which a late one is made to.

        A process that is killed may still have answered: it is gone all the same.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        self._late = late = threading.Event()

        def end() -> None:
            late.set()
            kill_with_children(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            found = process.stdout.readline()
        except OSError:
            found = ""
        finally:
            timer.cancel()
            timer.join()
        return "" if late.is_set() or not found.endswith("\n") else found

    def _end(self) -> str:
        """Be rid of a process that did not answer; returns how that came."""
        self.close()
        return OVER_TIME if self._late.is_set() else CRASHED


def usable_cores() -> int:
    """The cores that this process may run on."""
    known = hasattr(os, "sched_getaffinity")
    return (len(os.sched_getaffinity(0)) if known else os.cpu_count()) or 1


def serve(load: Callable[[], Answering], seconds: float) -> None:
    """In the process: say that it is ready, or why not, then answer each line with one."""
    questions = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = open(os.devnull, "r+")  # noqa: SIM115  # as long as the process
    os.dup2(nowhere.fileno(), 0)  # a user's code, and what it starts, reads no question
    os.dup2(2, 1)  # what it prints is no answer
    if hasattr(os, "register_at_fork"):  # nor does what it forks, even where that comes back here
        os.register_at_fork(after_in_child=lambda: _lead(questions, answers, to=nowhere))

    def say(it: Mapping[str, Any]) -> None:
        print(json.dumps(it), file=answers, flush=True)

    try:
        answer = load()
    except InputError as error:
        say({"error": str(error)})
        return
    say({})
    for line in questions:
        # Whoever started this kills it in time, and may have been killed itself; this ends it even
        # where a user's code holds the interpreter.
        faulthandler.dump_traceback_later(2 * seconds + 1, exit=True, file=nowhere)
        try:
            found = answer(json.loads(line))
        except InputError as error:  # what a user's code raised, or returned
            found = {"error": str(error)}
        faulthandler.cancel_dump_traceback_later()
        say(found)


def _lead(*streams: TextIO, to: TextIO) -> None:
    for stream in streams:
        os.dup2(to.fileno(), stream.fileno(), inheritable=False)


def dropped(lost: Sequence[Lost]) -> dict[str, int]:
    """How many there are, by why."""
    counts: dict[str, int] = {}
    for it in lost:
        counts[it.why] = counts.get(it.why, 0) + 1
    return counts
