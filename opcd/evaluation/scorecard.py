"""The scorecard: what contenders reached on the same requests, and how sure that is."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opcd.evaluation.constant import commonest
from opcd.evaluation.contenders import Answer, Contender
from opcd.evaluation.harm import disagreement, harm
from opcd.evaluation.intervals import (
    Difference,
    PerRequest,
    mean_of_shares_interval,
    paired_difference,
    ratio_interval,
    wilson_interval,
)
from opcd.scoring.reasoning import split_thought
from opcd.scoring.scorers import Score, Scorer
from opcd.scoring.texts import bare, folded
from opcd.tasks.task import Case, can_judge

FEW_CLASSES, CASES_A_CLASS = 10, 5


def scorecard(
    contenders: Sequence[Contender],
    answers: Mapping[str, Sequence[Answer]],  # by contender, one for each case
    said: Sequence[Answer],  # by the prompted teacher, one for each case
    cases: Sequence[Case],
    scorer: Scorer,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What each contender reached, by its name, and every answer behind it.

    An answer's NAME_right is true or false, or its value where that lies between 0 and 1; it is not
    there where nothing says what is right.
    """
    columns = {}
    classes = classes_of(cases)
    judged = can_judge(scorer, cases)
    rows: list[dict[str, Any]] = [
        {
            **({"context": c.example.context} if c.example.context else {}),
            "prompt": list(c.example.messages),
            **({"accepted": list(c.example.answers)} if c.example.answers else {}),
        }
        for c in cases
    ]
    for contender in contenders:
        given = answers[contender.name]
        column = _column(given, said)
        for row, answer in zip(rows, given, strict=True):
            row |= _as_row(contender.name, answer, scorer)
        if judged:
            scores = _scores(given, cases, scorer, [answer.text for answer in said])
            rates = [score.rates for score in scores]
            if classes and not any(rates):
                rates = [{name: score.value} for name, score in zip(classes, scores, strict=True)]
            column = _accuracy([score.value for score in scores]) | column | _rates(rates)
            if "balanced_accuracy" in column:
                most, share = commonest([answer.text for answer in given])
                column["commonest_answer"] = {"answer": most, "share": share}
            if share := _several_labels_share(given, scores, cases, scorer):
                column["several_labels_share"] = share
            for row, (value, own) in zip(rows, scores, strict=True):
                row[f"{contender.name}_right"] = bool(value) if value in (0, 1) else value
                if own:
                    row[f"{contender.name}_rates"] = own
        columns[contender.name] = {"meaning": contender.meaning, **column}
    for contender in contenders:
        if contender.without in columns:
            found = _harm(rows, contender, judged)
            columns[contender.name] |= {"harm": found} if found is not None else {}
    return columns, rows


def _harm(
    rows: Sequence[Mapping[str, Any]], contender: Contender, judged: bool
) -> dict[str, Any] | None:
    """What the context does to a model that is right, or at one with itself, without it."""
    names = contender.without, contender.name
    if judged:
        return harm(*([float(row[f"{name}_right"]) for row in rows] for name in names))
    return disagreement(*([row[name] for row in rows] for name in names))


def _as_row(name: str, answer: Answer, scorer: Scorer) -> dict[str, Any]:
    """An answer, and whatever else of it a scorecard is made from."""
    row: dict[str, Any] = {name: answer.text, f"{name}_tokens": answer.tokens}
    if answer.finish == "length":
        row[f"{name}_cut"] = True
    if scorer.reads_raw:
        row[f"{name}_raw"] = answer.raw
    return row


def more_right(rows: Sequence[Mapping[str, Any]], one: str, other: str) -> Difference:
    """How much more accurate one contender is than another, by the rows of `scorecard`."""
    each = [1.0] * len(rows)
    sides = ([float(row[f"{name}_right"]) for row in rows] for name in (one, other))
    return paired_difference(*(PerRequest(values, each) for values in sides))


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


def accuracy(
    answers: Sequence[Answer],
    cases: Sequence[Case],
    scorer: Scorer,
    teacher_answers: Sequence[str],
) -> float:
    """Mean value of the answers: the share that is right."""
    return fmean(score.value for score in _scores(answers, cases, scorer, teacher_answers))


def _scores(
    answers: Sequence[Answer],
    cases: Sequence[Case],
    scorer: Scorer,
    teacher_answers: Sequence[str],
) -> list[Score]:
    return [
        scorer(answer.text, case.example.answers, answer.raw, case.example.messages, theirs)
        for answer, case, theirs in zip(answers, cases, teacher_answers, strict=True)
    ]


def _accuracy(values: Sequence[float]) -> dict[str, Any]:
    total = math.fsum(values)
    return {
        "accuracy": total / len(values),
        "accuracy_interval_95": wilson_interval(total, len(values)),
    }


def _column(answers: Sequence[Answer], said: Sequence[Answer]) -> dict[str, Any]:
    same = [float(a.text == b.text) for a, b in zip(answers, said, strict=True)]
    column = {
        "greedy_agreement": PerRequest(same, [1] * len(same)).summary(share=True),
        "n": len(answers),
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
    if not one_each or len(rates) < 2:
        return {"rates": rates}
    shares = [(rate["mean"], rate["n"]) for rate in rates.values()]
    return {
        "rates": rates,
        "balanced_accuracy": fmean(share for share, _ in shares),
        "balanced_accuracy_interval_95": mean_of_shares_interval(shares),
    }


def internalised(base: float, prompted: float, distilled: float) -> float | None:
    """Share of the prompt's gain that the weights hold; None where the prompt gained nothing."""
    return (distilled - base) / (prompted - base) if prompted > base else None


def internalised_interval(rows: Sequence[Mapping[str, Any]], reference: str) -> list[float] | None:
    """95 % interval of `internalised`, drawn anew over requests, by the rows of `scorecard`.

    None where the prompt's gain is not above 0 in all that is drawn: its share is then anything.
    """
    base, prompted, distilled = (
        [float(row[f"{name}_right"]) for row in rows] for name in ("base", reference, "distilled")
    )
    taken = [d - b for d, b in zip(distilled, base, strict=True)]
    return ratio_interval(taken, [p - b for p, b in zip(prompted, base, strict=True)])
