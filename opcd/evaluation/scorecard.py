"""The scorecard: what contenders reached on the same requests, and how sure that is."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opcd.evaluation.contenders import Answer, Contender
from opcd.tasks.scorers import Scorer
from opcd.tasks.task import Case


def scorecard(
    contenders: Sequence[Contender],
    answers: Mapping[str, Sequence[Answer]],  # by contender, one for each case
    cases: Sequence[Case],
    scorer: Scorer,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What each contender reached, by its name, and every answer that it was made from."""
    columns = {}
    rows: list[dict[str, Any]] = [
        {"prompt": list(c.example.messages), "accepted": list(c.example.answers)} for c in cases
    ]
    for contender in contenders:
        given = answers[contender.name]
        right = [scorer(a.text, c.example.answers) for a, c in zip(given, cases, strict=True)]
        columns[contender.name] = {"meaning": contender.meaning, **_column(given, right)}
        for row, answer, ok in zip(rows, given, right, strict=True):
            row[contender.name] = answer.text
            row[f"{contender.name}_right"] = ok
    return columns, rows


def accuracy(answers: Sequence[Answer], cases: Sequence[Case], scorer: Scorer) -> float:
    """Share of the answers that are right."""
    pairs = zip(answers, cases, strict=True)
    return fmean(scorer(answer.text, case.example.answers) for answer, case in pairs)


def _column(answers: Sequence[Answer], right: Sequence[bool]) -> dict[str, Any]:
    return {
        "accuracy": sum(right) / len(right),
        "accuracy_interval_95": wilson_interval(sum(right), len(right)),
        "n": len(right),
        "mean_completion_tokens": fmean(answer.tokens for answer in answers),
        "truncated_share": fmean(answer.finish == "length" for answer in answers),
    }


def wilson_interval(successes: int, n: int, z: float = 1.959964) -> list[float]:
    """95 % score interval of a proportion (Wilson, 1927); honest at 0 and 1 too."""
    p = successes / n
    centre = p + z * z / (2 * n)
    spread_ = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + s) / (1 + z * z / n) for s in (-spread_, spread_))
    return [max(0.0, low), min(1.0, high)]


def internalised(base: float, prompted: float, distilled: float) -> float | None:
    """Share of the prompt's gain that the weights hold; None where the prompt gained nothing."""
    return (distilled - base) / (prompted - base) if prompted > base else None
