"""Accepted answers held against the scorer."""

from collections.abc import Callable, Sequence

import pytest

from opcd.errors import InputError
from opcd.scoring.scorers import Score, Scorer, load_scorer
from opcd.tasks.data import Example
from opcd.tasks.gold import check_gold


def examples(*answers: str) -> list[Example]:
    return [Example((), (answer,), f"test.jsonl:{i}") for i, answer in enumerate(answers, start=1)]


def test_answers_that_are_right_need_no_remark() -> None:
    assert check_gold(examples("taxi", "bus"), load_scorer("exact")) == []
    assert check_gold(examples("taxi", "bus"), load_scorer(r"regex:label=(\w+)")) == []
    assert check_gold([], load_scorer("exact")) == []


def test_an_answer_that_can_never_be_right_is_named() -> None:
    with pytest.raises(InputError, match=r"^test\.jsonl:2: scorer number .* 'many' .*no number"):
        check_gold(examples("42", "many"), load_scorer("number"))


@pytest.mark.parametrize(
    "answer", ["[Laughs] No.", '{"name": "f", "arguments": {}', "<tool_call>f()</tool_call>"]
)
def test_an_answer_that_is_no_call_is_named(answer: str) -> None:
    with pytest.raises(
        InputError, match=r"^test\.jsonl:2: scorer calls must be able to find the a"
    ):
        check_gold(examples("No.", answer), load_scorer("calls"))


def of_a_user(judge: Callable[[str, Sequence[str]], Score]) -> Scorer:
    return Scorer("python:m:f", lambda it: judge(it.completion, it.answers), None)


def test_labels_of_a_function_are_a_remark() -> None:
    scorer = of_a_user(lambda answer, accepted: Score(float(answer == "right" == accepted[0]), {}))
    assert check_gold(examples("right", "right"), scorer) == []
    (remark,) = check_gold(examples("right", "in scope", "out"), scorer)
    assert "finds 2 of 3 accepted answers wrong" in remark
    assert "first 'in scope' at test.jsonl:2" in remark


def test_a_function_to_which_all_answers_are_labels_is_no_alarm() -> None:
    (remark,) = check_gold(examples("in scope", "out"), of_a_user(lambda *_: Score(0.0, {})))
    assert remark == (
        "accepted answers are labels to scorer python:m:f: as a completion none of the 2 would be "
        "right itself, first 'in scope' at test.jsonl:1"
    )


def test_an_empty_completion_that_is_always_right_is_a_remark() -> None:
    (remark,) = check_gold(examples("a", "b"), of_a_user(lambda *_: Score(1.0, {})))
    assert "an empty completion right for all 2 examples" in remark


def test_rates_that_depend_on_the_completion_are_refused() -> None:
    """Before weights are loaded, with the row that they were found at."""
    scorer = of_a_user(lambda answer, _: Score(1.0, {"said" if answer else "silent": 1.0}))
    with pytest.raises(InputError, match=r"^test\.jsonl:1: .* got \['silent'\] and for 'a com"):
        check_gold(examples("a"), scorer)
