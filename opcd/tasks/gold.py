"""Accepted answers held against the scorer, before weights are loaded: can they count at all?"""

from collections.abc import Sequence
from typing import Any

from opcd.errors import InputError
from opcd.scoring.scorers import Scorer
from opcd.tasks.data import Example


def check_gold(examples: Sequence[Example], scorer: Scorer) -> list[str]:
    """Try the scorer on every example; returns what people should know, a line each.

    Raises InputError for an answer that a built-in scorer can never find right, and for a function
    that raises, returns no score, or names its rates by the completion. To a function an answer
    may be a label, which is no completion itself: that is a remark, where only some are another.
    """
    below = []
    blanks_right = 0
    examples = [e for e in examples if e.answers or not scorer.needs_answers]
    for example in examples:
        _check_answers(example, scorer)  # first: those at fault are not for the scorer to read
        probes = ("", "a completion", *example.answers)
        about: dict[str, Any] = {"prompt": example.messages, "teacher_answer": "a completion"}
        try:
            scores = [scorer(text, example.answers, **about) for text in probes]
        except InputError as error:
            raise InputError(f"{example.source}: {error}") from error
        blanks_right += scores[0].value == 1
        below += [
            f"{answer!r} at {example.source}"
            for answer in example.answers
            if not scorer.fault and scorer(answer, (answer,), **about).value < 1
        ]
    total = sum(len(example.answers) for example in examples)
    remarks = []
    if 0 < len(below) < total:
        remarks.append(
            f"scorer {scorer.spec} finds {len(below)} of {total} accepted answers wrong as "
            f"completions of themselves, first {below[0]}; as it should where those are labels"
        )
    elif below:
        remarks.append(
            f"accepted answers are labels to scorer {scorer.spec}: as a completion none of the "
            f"{total} would be right itself, first {below[0]}"
        )
    if examples and blanks_right == len(examples):
        remarks.append(
            f"scorer {scorer.spec} finds an empty completion right for all {len(examples)} examples"
        )
    return remarks


def _check_answers(example: Example, scorer: Scorer) -> None:
    """Raise InputError for an answer that a built-in scorer can never find right."""
    for answer in example.answers:
        if scorer.fault and (fault := scorer.fault(answer)):
            raise InputError(
                f"{example.source}: scorer {scorer.spec} must be able to find the answer "
                f"{answer!r} right, but {fault}"
            )
