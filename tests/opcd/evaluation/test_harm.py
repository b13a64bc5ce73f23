"""What a context does to a model that does without it, and who gives one answer to everything."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.evaluation.constant import best_constant, commonest
from opcd.evaluation.contenders import Answer, Contender
from opcd.evaluation.facts import constant_facts, harm_facts
from opcd.evaluation.harm import disagreement, harm
from opcd.evaluation.intervals import wilson_interval
from opcd.evaluation.scorecard import scorecard
from opcd.scoring.scorers import load_scorer
from opcd.tasks.prepare import prepare
from opcd.tasks.task import Case
from tests.conftest import write_jsonl

LABELS = ["music"] * 14 + ["taxi"] * 7 + ["recipe"] * 7


def test_harm_is_wrong_with_the_context_among_right_without() -> None:
    """Of four that are right without it, one is lost; what is gained does not make up for it."""
    found = harm([1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 0])
    assert found == {
        "of": "right without the context",
        "mean": 0.25,
        "interval_95": wilson_interval(1, 4),
        "requests": 4,
    }
    assert harm([0, 0], [1, 1]) is None
    graded = harm([0.5, 1.0, 0.0], [0.25, 1.0, 1.0])
    assert graded is not None
    assert graded["mean"] == pytest.approx(0.25 / 1.5)
    same = harm([0.5, 0.75, 1.0], [0.5, 0.75, 1.0])
    assert same is not None
    assert same["mean"] == 0


def test_without_labels_it_is_disagreement() -> None:
    found = disagreement(["a", "b", "c", "d"], ["a", "x", "c", "d"])
    assert (found["mean"], found["requests"]) == (0.25, 4)


def cases_of(settings: dict, labelled: bool = True) -> list[Case]:
    rows = [
        {"prompt": f"n {i}"} | ({"answer": x} if labelled else {}) for i, x in enumerate(LABELS)
    ]
    write_jsonl(Path(settings["test_data"]), rows)
    if not labelled:
        write_jsonl(Path(settings["validation_data"]), [{"prompt": "v 1"}])
    return prepare(TrainConfig(**settings)).task.test


def card_of(cases: Sequence[Case], given: dict[str, list[str]]) -> dict:
    """A scorecard of answers; a contender x_prompted is x with the context."""
    contenders = [
        Contender(name, "", list, without=name.removesuffix("_prompted") if "_" in name else "")
        for name in given
    ]
    answers = {n: [Answer(t, [0], "stop", t) for t in texts] for n, texts in given.items()}
    scorer = load_scorer("exact")
    columns, _ = scorecard(contenders, answers, answers["prompted"], cases, scorer)
    said = given["prompted"]
    most = [c["commonest_answer"]["answer"] for c in columns.values() if "commonest_answer" in c]
    constant = best_constant(cases, scorer, said, most)
    return {"contenders": columns, "constant": constant._asdict() if constant else None}


def test_the_majority_label_gets_one_kth_and_a_warning(settings: dict) -> None:
    good = [*LABELS[:-1], "taxi"]
    given = {"base": good, "prompted": good, "distilled": ["Music."] * 28}
    card = card_of(cases_of(settings), given)
    column = card["contenders"]["distilled"]
    assert column["accuracy"] == 0.5
    assert column["balanced_accuracy"] == pytest.approx(1 / 3)
    low, high = column["balanced_accuracy_interval_95"]
    assert low < 1 / 3 < high, "not certain"
    assert card["constant"] == {"answer": "music", "accuracy": 0.5}
    best, warning = constant_facts(card)
    assert best == "one answer for all ('music') reaches 50.0%"
    assert warning == (
        "distilled says 'Music.' to 100% of requests: its accuracy of 50.0% is that of one answer "
        "for all, balanced over classes 33.3%"
    )
    given["prompted"] = ["music"] * 28
    assert len(constant_facts(card_of(cases_of(settings), given))) == 1, "what the prompt asks for"


def test_who_copies_the_prompted_model_agrees_and_does_no_harm(settings: dict) -> None:
    said = [*LABELS[:20], *["music"] * 8]
    given = {"prompted": said, "copy": said, "copy_prompted": said}
    columns = card_of(cases_of(settings), given)["contenders"]
    assert columns["copy"]["greedy_agreement"]["mean"] == 1
    assert columns["copy_prompted"]["harm"]["mean"] == 0
    assert columns["copy_prompted"]["harm"]["requests"] == 20
    unlabelled = card_of(cases_of(settings, labelled=False), given)["contenders"]
    assert unlabelled["copy_prompted"]["harm"]["of"] == "all answers"
    assert unlabelled["copy_prompted"]["harm"]["mean"] == 0


def test_harm_is_said(settings: dict) -> None:
    lost = ["no"] * 7 + LABELS[7:]
    given = {"prompted": LABELS, "distilled": LABELS, "distilled_prompted": lost}
    columns = card_of(cases_of(settings), given)["contenders"]
    assert columns["distilled_prompted"]["harm"]["mean"] == 0.25
    (fact,) = harm_facts(columns)
    assert fact.startswith("harm: given the prompt back, 25.0% (12.7% – 43.4%) of what the distil")
    assert json.loads(json.dumps(columns)) == columns


def test_where_answers_are_many_nobody_guesses_one(settings: dict) -> None:
    rows = [{"prompt": f"n {i}", "answer": f"{i}"} for i in range(28)]
    write_jsonl(Path(settings["test_data"]), rows)
    cases = prepare(TrainConfig(**settings)).task.test
    given = {"base": ["1"] * 28, "prompted": ["1"] * 28}
    card = card_of(cases, given)
    assert card["constant"] is None
    assert constant_facts(card) == []


def test_a_constant_that_only_a_contender_knows_is_tried(settings: dict) -> None:
    """As a refusal that a scorer of the user's finds right where labels are names of classes."""
    cases = cases_of(settings)
    said = [""] * len(cases)
    scorer = load_scorer("contains")
    assert best_constant(cases, scorer, said) == ("music", 0.5)
    assert best_constant(cases, scorer, said, ["taxi, recipe or music", "no"]) is None, "all right"
    assert best_constant(cases, scorer, said, ["music or taxi"]) == ("music or taxi", 0.75)


def test_the_commonest_answer_is_that_of_all_spellings() -> None:
    assert commonest(["A.", "b", "a", "A"]) == ("A.", 0.75)
