"""What a validation makes of answers, and which validation is the better one."""

import pytest

from opcd.config import TrainConfig
from opcd.evaluation.agreement import gap_between, kl_both_ways
from opcd.evaluation.contenders import Answer
from opcd.tasks.prepare import prepare
from opcd.training.build import build_distiller
from opcd.training.validation import Validation, rank


def answers(*texts: str) -> list[Answer]:
    return [Answer(text, [7], "stop", text) for text in texts]


def test_the_prompted_teacher_is_compared_request_by_request(settings: dict) -> None:
    validation = Validation(None, prepare(TrainConfig(**settings)))
    validation.said = answers("a", "p", "f")
    found = validation._judged(answers("a", "a", "a"))
    assert (found["accuracy"], found["n"]) == (pytest.approx(1 / 3), 3)
    behind = found["behind_prompted"]
    assert (behind["mean"], behind["requests"]) == (pytest.approx(2 / 3), 3)
    assert behind["p_value"] == 0.5  # both signs of two differences may all be the same


def test_without_labels_nothing_is_judged(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings))
    setup.task.validation = setup.task.training  # which have no answers
    validation = Validation(None, setup)
    validation.said = answers(*"abcdefghijkl")
    assert validation._judged(validation.said) == {}


def test_which_validation_is_better() -> None:
    best_first = [
        {"accuracy": 0.6, "missed_kl": 0.2},
        {"accuracy": 0.6, "missed_kl": 0.3},
        {"accuracy": 0.6, "gap": 0.01},  # of a version before
        {"accuracy": 0.5, "missed_kl": 0.1},
    ]
    assert sorted(best_first, key=rank) == best_first[::-1]
    assert rank({"missed_kl": 0.2}) > rank({"missed_kl": 0.3})


def test_who_is_too_certain_is_not_the_better_one(settings: dict) -> None:
    """Of a teacher's answers a sharpened teacher misses nothing, and is not the teacher."""
    setup = prepare(TrainConfig(**settings), for_training=True)
    distiller = build_distiller(setup)
    validation = Validation(distiller, setup)
    theirs, head = validation.shown.hidden, validation.shown.head
    found = []
    for sharper in (1.0, 4.0):
        student = validation.shown._replace(hidden=sharper * theirs)
        missed = kl_both_ways(student, validation.shown, 1.0).forward_kl.mean
        gap = gap_between(student, validation.shown, 1.0).nats.mean
        found.append({"gap": gap, "missed_kl": missed})
    same, certain = found
    assert head.bias is None
    assert certain["gap"] < same["gap"] == 0
    assert rank(same) > rank(certain)
    measured = validation.measure()
    assert measured["missed_kl"] > 0.1
