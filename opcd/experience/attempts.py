"""Attempts: made by the model as it is, or left by a server in a log."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from opcd.errors import InputError
from opcd.runtime.strict_json import parse_json
from opcd.tasks.data import Example
from opcd.tasks.formats import read_row
from opcd.tasks.messages import Message, assistant, split_system
from opcd.tasks.records import read_lines

RIGHT = 1.0  # a value: anything less is in part right


@dataclass(frozen=True)
class Attempt:
    """One attempt at a problem, and how right it is."""

    problem: list[Message]
    turns: list[Message]  # the answer; of a game, moves and what was told behind them
    value: float | None  # from 0 to 1; None: nobody knows
    finish: str = "stop"  # "length": some of it was cut
    accepted: str = ""  # the first accepted answer, where one is known
    counts: dict[str, float] = field(default_factory=dict)  # what else was found, by name

    @property
    def right(self) -> bool:
        """Whether it is known to be right, and whole."""
        return self.value is not None and self.value >= RIGHT and self.finish == "stop"

    @property
    def said(self) -> list[str]:
        """What the model said, turn by turn."""
        return [turn["content"] for turn in self.turns if turn["role"] == "assistant"]

    @property
    def text(self) -> str:
        """All that it said."""
        return "\n".join(self.said)

    def as_dict(self) -> dict[str, Any]:
        """As files hold it."""
        return asdict(self)


def read_log(path: str) -> tuple[list[Attempt], dict[str, int]]:
    """The attempts in a log of conversations, and how many lines were skipped, by why.

    A line is a row with a completion: ``{"messages": [..., the assistant's]}``, and if it is known
    ``"outcome"``: true, false or a number from 0 to 1. System messages are left out: the setting
    without_context takes their place. Raises InputError for a log without a line that can be read.
    """
    attempts: list[Attempt] = []
    skipped = Counter[str]()
    first = ""
    for number, line in enumerate(read_lines(path, "log"), start=1):
        if not line.strip():
            continue
        try:
            attempts.append(_logged(line, f"{path}:{number}"))
        except InputError as error:
            skipped["lines that hold no answered conversation"] += 1
            first = first or str(error)
    if not attempts:
        raise InputError(
            f'{path}: a log must hold conversations, a line each like {{"messages": [...], '
            f'"outcome": true}}, got none in {skipped.total()} lines; the first: {first}'
        )
    return attempts, dict(skipped)


def _logged(line: bytes, source: str) -> Attempt:
    try:
        record = parse_json(line.decode("utf-8"))
    except ValueError as error:
        raise InputError(f"{source}: must be JSON in UTF-8, got {error}; correct it") from error
    if not isinstance(record, dict):
        raise InputError(f"{source}: must be an object, got {type(record).__name__}")
    outcome = record.pop("outcome", None)
    if not (outcome is None or (isinstance(outcome, (bool, int, float)) and 0 <= outcome <= 1)):
        raise InputError(
            f"{source}: outcome must be true, false or a number from 0 to 1, got {outcome!r:.40}"
        )
    row = read_row(record, source, {"completion"})
    problem = split_system(row.messages)[1]
    if not row.completion or not problem or row.calls:
        raise InputError(f"{source}: the assistant's answer must be a text, got none")
    value = None if outcome is None else float(outcome)
    return Attempt(problem, [assistant(row.completion)], value)


def problems_of(attempts: Sequence[Attempt], source: str) -> list[Example]:
    """Each problem that was attempted, once."""
    return [Example(tuple(same[0].problem), (), source) for same in by_problem(attempts)]


def by_problem(attempts: Sequence[Attempt]) -> list[list[Attempt]]:
    """Attempts at the same problem together, in their order."""
    found: dict[str, list[Attempt]] = {}
    for attempt in attempts:
        found.setdefault(spelled(attempt.problem), []).append(attempt)
    return [*found.values()]


def spelled(problem: Sequence[Message]) -> str:
    """A problem as one text, by which it is known."""
    return json.dumps(list(problem), sort_keys=True)


def read_attempts(rows: Sequence[dict[str, Any]]) -> list[Attempt]:
    """From what `Attempt.as_dict` gave."""
    return [Attempt(**row) for row in rows]


def summary(attempts: Sequence[Attempt], lost: dict[str, int]) -> dict[str, Any]:
    """Counts without texts."""
    known = [a for a in attempts if a.value is not None]
    return {
        "attempts": len(attempts) + sum(lost.values()),
        "judged": len(known),
        "right": sum(a.right for a in attempts),
        "dropped": lost,
        "counts": means([a.counts for a in attempts]),
    }


def means(counts: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each count, over those that have some."""
    some = [it for it in counts if it]
    return {name: fmean(it[name] for it in some) for name in (some[0] if some else {})}
