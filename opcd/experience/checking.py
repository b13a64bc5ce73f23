"""Checkers in processes of their own, one a core: a user's code may raise, hang or crash there.

A checker is a scorer by its name: exact, number, json, choice, math, python:FILE.py:function, ...
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opcd.runtime.workers import Lost, Workers


class Asked(NamedTuple):
    """A completion to be checked; see `scoring.scorers.Judged`."""

    completion: str
    answers: Sequence[str]
    raw: str
    prompt: Sequence[Mapping[str, Any]]


class Checkers:
    """Workers that judge completions, each call within `seconds`; a context manager.

    Entering raises InputError for a scorer that cannot be loaded.
    """

    def __init__(self, scorer: str, seconds: float, workers: int | None = None) -> None:
        self._workers = Workers("opcd.experience.check_worker", [scorer], seconds, workers)

    def __enter__(self) -> "Checkers":
        self._workers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
        self._workers.close()

    def check(self, asked: Sequence[Asked]) -> list[float | Lost]:
        """How right each completion is, from 0 to 1, in order."""
        answers = self._workers.ask([it._asdict() for it in asked])
        return [it if isinstance(it, Lost) else it["value"] for it in answers]
