"""The scorecard: what contenders reached on the same requests, and how sure that is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opcd.evaluation.contenders import Answer, Contender
from opcd.scoring.reasoning import split_thought
from opcd.scoring.scorers import Score, Scorer
from opcd.scoring.texts import bare, folded
from opcd.tasks.task import Case

FEW_CLASSES, CASES_A_CLASS = 10, 5


def scorecard(
    contenders: Sequence[Contender],
    answers: Mapping[str, Sequence[Answer]],  # by contender, one for each case
    cases: Sequence[Case],
    scorer: Scorer,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What each contender reached, by its name, and every answer that it was made from.

    An answer's NAME_right is true or false, or its value where that lies between 0 and 1.
    """
    columns = {}
    classes = classes_of(cases)
    rows: list[dict[str, Any]] = [
        {
            **({"context": c.example.context} if c.example.context else {}),
            "prompt": list(c.example.messages),
            "accepted": list(c.example.answers),
        }
        for c in cases
    ]
    for contender in contenders:
        given = answers[contender.name]
        scores = _scores(given, cases, scorer)
        rates = [score.rates for score in scores]
        if classes and not any(rates):
            rates = [{name: score.value} for name, score in zip(classes, scores, strict=True)]
        column = _column(given, [score.value for score in scores]) | _rates(rates)
        if share := _several_labels_share(given, scores, cases, scorer):
            column["several_labels_share"] = share
        columns[contender.name] = {"meaning": contender.meaning, **column}
        for row, answer, (value, own) in zip(rows, given, scores, strict=True):
            row[contender.name] = answer.text
            row[f"{contender.name}_right"] = bool(value) if value in (0, 1) else value
            if own:
                row[f"{contender.name}_rates"] = own
    return columns, rows


def classes_of(cases: Sequence[Case]) -> list[str] | None:
    """The class of each case, its accepted answer as it is compared; None where there are none.

    Classes are few, and each has several cases.
    """
    classes = _only_answers(cases)
    counts = Counter(classes)
    few = 1 < len(counts) <= FEW_CLASSES and min(counts.values()) >= CASES_A_CLASS
    return classes if few else None


def _only_answers(cases: Sequence[Case]) -> list[str]:
    """Each case's accepted answer as it is compared; [] where a case has several."""
    if any(len(case.example.answers) != 1 for case in cases):
        return []
    return [folded(bare(case.example.answers[0])) for case in cases]


def _several_labels_share(
    answers: Sequence[Answer], scores: Sequence[Score], cases: Sequence[Case], scorer: Scorer
) -> float:
    """Share of the answers that `contains` finds right, and right for another label as well.

    Answers are labels where each is the answer of several cases, in the mean.
    """
    only = _only_answers(cases)
    if scorer.spec != "contains" or not only or len(cases) < CASES_A_CLASS * len(set(only)):
        return 0.0
    own = [case.example.answers for case in cases]  # of one each
    labels = dict(zip(only, own, strict=True)).values()
    several = 0
    for answer, score, (right,) in zip(answers, scores, own, strict=True):
        others = [label for label in labels if scorer(right, label).value == 0]
        several += score.value == 1 and any(scorer(answer.text, x).value for x in others)
    return several / len(cases)


def accuracy(answers: Sequence[Answer], cases: Sequence[Case], scorer: Scorer) -> float:
    """Mean value of the answers: the share that is right."""
    return fmean(score.value for score in _scores(answers, cases, scorer))


def _scores(answers: Sequence[Answer], cases: Sequence[Case], scorer: Scorer) -> list[Score]:
    pairs = zip(answers, cases, strict=True)
    return [scorer(answer.text, case.example.answers, answer.raw) for answer, case in pairs]


def _column(answers: Sequence[Answer], values: Sequence[float]) -> dict[str, Any]:
    total = math.fsum(values)
    column = {
        "accuracy": total / len(values),
        "accuracy_interval_95": wilson_interval(total, len(values)),
        "n": len(values),
        "mean_completion_tokens": fmean(answer.tokens for answer in answers),
        "truncated_share": fmean(answer.finish == "length" for answer in answers),
    }
    if share := fmean(split_thought(answer.text).thought != "" for answer in answers):
        column["reasoning_share"] = share
    return column


def _rates(found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Each rate over the items that have it; their mean where they are classes of the items."""
    by_name: dict[str, list[float]] = {}
    for item in found:
        for name, rate in item.items():
            by_name.setdefault(name, []).append(rate)
    if not by_name:
        return {}
    rates = {name: {"mean": fmean(x), "n": len(x)} for name, x in sorted(by_name.items())}
    one_each = all(len(item) == 1 for item in found)
    if one_each and len(rates) > 1:
        return {"rates": rates, "balanced_accuracy": fmean(r["mean"] for r in rates.values())}
    return {"rates": rates}


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> list[float]:
    """95 % score interval of a proportion (Wilson, 1927); honest at 0 and 1 too.

    Of the mean of values between 0 and 1, too, and then too wide rather than too narrow: with that
    mean nothing varies more than values that are 0 or 1.
    """
    p = successes / n
    centre = p + z * z / (2 * n)
    spread_ = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + s) / (1 + z * z / n) for s in (-spread_, spread_))
    return [max(0.0, low), min(1.0, high)]


def internalised(base: float, prompted: float, distilled: float) -> float | None:
    """Share of the prompt's gain that the weights hold; None where the prompt gained nothing."""
    return (distilled - base) / (prompted - base) if prompted > base else None
