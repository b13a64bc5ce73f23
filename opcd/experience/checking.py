"""Checkers in processes of their own, one a core: a user's code may raise, hang or crash there.

A checker is a scorer by its name: exact, number, json, choice, math, python:FILE.py:function, ...
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import opcd
from opcd.errors import InputError

START_SECONDS = 120.0  # in which a checker's module must be imported
OVER_TIME, CRASHED, RAISED = "over the time limit", "crashed", "raised"


class Asked(NamedTuple):
    """A completion to be checked; see `scoring.scorers.Judged`."""

    completion: str
    answers: Sequence[str]
    raw: str
    prompt: Sequence[Mapping[str, Any]]


class Checked(NamedTuple):
    """How right a completion is, from 0 to 1; None where that is not known, and why."""

    value: float | None
    why: str = ""  # OVER_TIME, CRASHED or RAISED
    detail: str = ""  # what was raised, which may quote the completion


class Checkers:
    """Workers that judge completions, each call within `seconds`; a context manager.

    A worker that hangs or crashes is replaced, and what it was asked is not known. Entering raises
    InputError for a scorer that cannot be loaded.
    """

    def __init__(self, scorer: str, seconds: float, workers: int | None = None) -> None:
        command = [sys.executable, "-m", "opcd.experience.check_worker", scorer, str(seconds)]
        self._workers = [_Worker(command, seconds) for _ in range(workers or os.cpu_count() or 1)]

    def __enter__(self) -> "Checkers":
        try:
            self.check([])
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.close()

    def check(self, asked: Sequence[Asked]) -> list[Checked]:
        """Judge completions, in order."""
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            free.put(worker)

        def by_a_free_one(it: Asked) -> Checked:
            worker = free.get()
            try:
                return worker.ask(it)
            finally:
                free.put(worker)

        with ThreadPoolExecutor(len(self._workers)) as threads:
            list(threads.map(_Worker.start, self._workers))
            return list(threads.map(by_a_free_one, asked))


class _Worker:
    """One process; a new one where it ended."""

    def __init__(self, command: list[str], seconds: float) -> None:
        self._command, self._seconds = command, seconds
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Have a process that is ready. Raises InputError where its scorer cannot be loaded."""
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
        said = json.loads(line) if line else {"error": f"its process {self._end(START_SECONDS)}"}
        if "error" in said:
            self.close()
            raise InputError(said["error"])

    def ask(self, asked: Asked) -> Checked:
        """What the checker says."""
        self.start()
        line = self._read(self._seconds, json.dumps(asked._asdict()) + "\n")
        if not line:
            return Checked(None, self._end(self._seconds))
        said = json.loads(line)
        if "error" in said:
            return Checked(None, RAISED, said["error"])
        return Checked(said["value"])

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
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
            process.kill()

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

    def _end(self, seconds: float) -> str:
        """Be rid of a process that did not answer; returns how that came."""
        self.close()
        return OVER_TIME if self._late.is_set() else CRASHED


def dropped(checked: Sequence[Checked]) -> dict[str, int]:
    """How many completions nobody could judge, by why."""
    return dict(Counter(c.why for c in checked if c.value is None))
