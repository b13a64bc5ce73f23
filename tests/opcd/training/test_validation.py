"""What a validation makes of answers, and which validation is the better one."""

import pytest

from opcd.config import TrainConfig
from opcd.evaluation.contenders import Answer
from opcd.tasks.prepare import prepare
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
        {"accuracy": 0.6, "gap": 0.2},
        {"accuracy": 0.6, "gap": 0.3},
        {"accuracy": 0.6, "divergence": 0.01},  # of a version before
        {"accuracy": 0.5, "gap": 0.1},
    ]
    assert sorted(best_first, key=rank) == best_first[::-1]
    assert rank({"gap": 0.2}) > rank({"gap": 0.3})
