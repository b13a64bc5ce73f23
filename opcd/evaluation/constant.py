"""What one answer for every request would reach, and who gives one."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from opcd.scoring.scorers import Scorer
from opcd.scoring.texts import bare, folded
from opcd.tasks.task import Case

TRIED = 10  # accepted answers, the commonest first
LITTLE = 0.1  # of what one answer for all gets wrong
ALWAYS = 0.95  # of the answers: a contender that says nothing else


class Constant(NamedTuple):
    """One answer, and the accuracy of whoever gives it to every request."""

    answer: str
    accuracy: float


def best_constant(
    cases: Sequence[Case],
    scorer: Scorer,
    said: Sequence[str],  # by the prompted teacher, one for each case
    others: Iterable[str] = (),  # tried as well, such as what contenders say most often
) -> Constant | None:
    """The best one of the accepted answers that several requests share.

    None where answers are many, each that of one request, and where one is right for all: nothing
    is told apart there.
    """
    counts = Counter(a for case in cases for a in dict.fromkeys(case.example.answers))
    shared = [answer for answer, count in counts.most_common(TRIED) if count > 1]
    if not shared:
        return None
    best = max(
        (Constant(a, _reached(a, cases, scorer, said)) for a in dict.fromkeys([*shared, *others])),
        key=lambda constant: constant.accuracy,
    )
    return best if best.accuracy < 1 else None


def hardly_better(accuracy: float, constant: float) -> bool:
    """Whether an accuracy is that of one answer for all, or little more."""
    return accuracy - constant <= LITTLE * (1 - constant)


def commonest(texts: Sequence[str]) -> tuple[str, float]:
    """The answer that is given most often, as it is spelled first, and its share of the answers."""
    compared = [folded(bare(text)) for text in texts]
    most, count = Counter(compared).most_common(1)[0]
    return texts[compared.index(most)], count / len(texts)


def _reached(answer: str, cases: Sequence[Case], scorer: Scorer, said: Sequence[str]) -> float:
    values = [
        scorer(answer, case.example.answers, answer, case.example.messages, theirs).value
        for case, theirs in zip(cases, said, strict=True)
    ]
    return sum(values) / len(values)
