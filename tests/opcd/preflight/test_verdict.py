"""The verdict before a run: which reason comes first, and where each one ends."""

from typing import Any

import pytest

from opcd.evaluation.intervals import PerRequest, paired_difference, wilson_interval
from opcd.preflight.verdict import Found, Measured, hindrance, verdict


def judged(n: int, both: int = 0, gained: int = 0, lost: int = 0, **more: Any) -> dict[str, Any]:
    """Of n requests so many are right with and without the prompt, with it alone, without alone."""
    without = [1.0] * (both + lost) + [0.0] * (n - both - lost)
    with_prompt = [1.0] * both + [0.0] * lost + [1.0] * gained + [0.0] * (n - both - lost - gained)
    gain = paired_difference(PerRequest(with_prompt, [1] * n), PerRequest(without, [1] * n))
    rates = {"base": sum(without) / n, "prompted": sum(with_prompt) / n}
    return {"requests": n, **rates, "gain": gain, **more}


def changed(n: int, others: int) -> dict[str, Any]:
    low, high = wilson_interval(others, n)
    return {"requests": n, "changed": others / n, "changed_interval": (low, high)}


def shifted(low: float, high: float) -> dict[str, Any]:
    return {"shift": (low + high) / 2, "shift_interval": (low, high)}


UNJUDGED = Measured(
    **changed(64, 58),
    **shifted(1.8, 2.2),
    gap=2.0,
    gap_interval=(1.8, 2.2),
    unmet=0.1,
    hard_tokens=2.1,
    tokens=2.5,
    likelihood=[1e-6, 1e-4],
    missed_at="payment",
    cut=0.0,
    empty=0.0,
)
GOES = UNJUDGED._replace(**judged(64, both=6, gained=45, constant=0.3))
SAME = changed(64, 0) | shifted(0.0, 0.01)


def said_of(change: dict[str, Any], measured: Measured = GOES) -> Any:
    measures = {k: v for k, v in change.items() if k in Measured._fields}
    others = {k: v for k, v in change.items() if k in Found._fields}
    assert len(measures) + len(others) == len(change)
    return verdict(Found(measured=measured._replace(**measures), **others))


@pytest.mark.parametrize(
    ("change", "word", "says"),
    [
        ({}, "go", "accuracy 9% without it, 80% with it: +70 points (+59 – +81), 91% of 64"),
        ({"wrong_inputs": "p.jsonl:3: the teacher's prompt"}, "wrong inputs", "p.jsonl:3"),
        (
            {"memory_needed": 12 * 10**9, "memory_free": 8 * 10**9},
            "does not fit",
            "memory than is free (12.0 GB of 8.0 GB); take a smaller model",
        ),
        (
            {
                "memory_needed": 2,
                "memory_free": 1,
                "fits_with": "lora_rank 16, learning_rate 0.001",
            },
            "does not fit",
            "; set lora_rank 16, learning_rate 0.001",
        ),
        (
            {"disk_needed": 3_800_000_000, "disk_free": 10**9},
            "does not fit",
            "3.8 GB of 1.0 GB on the disk of output_dir",
        ),
        ({"memory_needed": 1, "memory_free": 1, "disk_needed": 1, "disk_free": 1}, "go", ""),
        ({"memory_needed": 2, "disk_needed": 2}, "go", ""),
        ({"cut": 0.51}, "the prompt does not work", "cut at max_completion_tokens (51% of 64)"),
        ({"empty": 0.6}, "the prompt does not work", "empty (60% of 64)"),
        ({"pays_after": 5000.0, "expected_requests": 4999.0}, "keep the prompt", "4,999 expected"),
        ({"pays_after": 5000.0, "expected_requests": 5000.0}, "go", ""),
        ({"pays_after": 5000.0}, "go", ""),
        ({"expected_requests": 1.0}, "go", ""),
        ({"unmet": 0.3}, "needs guided rollouts", "30% of the gap lies"),
        ({"unmet": 0.24}, "needs guided rollouts", "24% of the gap lies"),  # a policy's
        ({"unmet": 0.2}, "go", ""),
        ({"unmet": 0.3, "guided_share": 0.25}, "go", ""),
        ({"empty_context": 0.21}, "wrong inputs", "the same tokens (0.21 nats a token apart"),
        ({"empty_context": 0.19}, "go", ""),
    ],
)
def test_one_reason_at_a_time(change: dict, word: str, says: str) -> None:
    found = said_of(change)
    assert found.word == word
    assert says in str(found)
    assert found.goes == (word == "go")


def test_answers_that_nobody_judged_are_to_be_read() -> None:
    assert "nobody has judged its answers with the prompt" in str(said_of({}, UNJUDGED))
    assert said_of({}, GOES).setting == ""


@pytest.mark.parametrize(
    ("answers", "word", "says"),
    [
        # 50 % and 72 %: two intervals that overlap, of requests that are the same
        (judged(64, both=26, gained=20, lost=6), "go", "50% without it, 72% with it: +22 points"),
        (judged(64, both=6), "the prompt does not work", "gains little, if anything"),
        (judged(64, both=20, gained=6, lost=5), "the prompt does not work", "+2 points"),
        (judged(12, both=2), "too few requests", "score base and prompted model alone"),
        (judged(24, both=4, gained=5, lost=1), "too few requests", "+17 points"),
        (judged(24, gained=16, constant=0.33), "go", ""),
        (judged(24, lost=12), "the prompt does not work", "answers are worse with it"),
        # nine of ten rows are of one class, and the others are told from them
        (judged(64, gained=62, constant=58 / 64), "go", ""),
        (
            judged(64, gained=21, constant=21 / 64),
            "the prompt does not work",
            "hardly better than one answer for everything (accuracy 0% without it, 33% with it",
        ),
        (judged(64, gained=25, constant=21 / 64), "the prompt does not work", "alone has 33%"),
        (judged(64, gained=26, constant=21 / 64), "go", ""),
        (judged(64, gained=21, constant=None), "go", ""),
    ],
)
def test_of_answers_that_are_judged(answers: dict, word: str, says: str) -> None:
    found = said_of(answers)
    assert found.word == word, str(found)
    assert says in str(found)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, "go"),
        (changed(64, 1) | shifted(0.0, 0.05), "the prompt changes nothing"),
        (changed(64, 2) | shifted(0.0, 0.05), "too few requests"),
        (changed(64, 1) | shifted(0.0, 0.051), "too few requests"),
        (changed(64, 1) | shifted(0.051, 0.2), "go"),
        (changed(64, 13) | shifted(0.0, 0.01), "go"),
        # a third of the answers are others, and six requests say little
        (changed(6, 2) | shifted(0.0, 0.3), "too few requests"),
        (changed(6, 0) | shifted(0.0, 0.0), "too few requests"),
        ({"unmet": 0.5}, "needs guided rollouts"),
    ],
)
def test_of_answers_that_nothing_judges(change: dict, word: str) -> None:
    found = said_of(change, UNJUDGED)
    assert found.word == word, str(found)
    assert "accuracy" not in str(found)


def test_a_prompt_that_changes_nothing_is_left_out_where_answers_are_judged_too() -> None:
    for right in (0, 32, 64):
        found = said_of(judged(64, both=right) | SAME)
        assert found.word == "the prompt changes nothing"
        assert found.setting == "leave it out"


def test_a_teacher_is_named_beside_the_student() -> None:
    found = said_of({"unprompted": 0.4})
    assert "accuracy 9% without it (40% by the teacher), 80% with it" in found.evidence


def test_the_first_reason_counts() -> None:
    reasons = [
        ("wrong inputs", {"wrong_inputs": "x"}),
        ("does not fit", {"memory_needed": 2, "memory_free": 1}),
        ("does not fit", {"disk_needed": 2, "disk_free": 1}),
        ("the prompt changes nothing", SAME),
        ("the prompt does not work", {"cut": 1.0}),
        ("too few requests", judged(12, both=2)),
        ("wrong inputs", {"empty_context": 1.0}),
        ("keep the prompt", {"pays_after": 2.0, "expected_requests": 1.0}),
        ("needs guided rollouts", {"unmet": 1.0}),
    ]
    change: dict[str, Any] = {}
    for word, reason in reversed(reasons):
        change |= reason
        assert said_of(change).word == word


def test_what_is_known_before_models_are_asked() -> None:
    assert hindrance(Found(memory_needed=1, memory_free=1, disk_needed=1, disk_free=1)) is None
    assert hindrance(Found()) is None
    for change, word in (
        ({"wrong_inputs": "x"}, "wrong inputs"),
        ({"memory_needed": 2, "memory_free": 1}, "does not fit"),
        ({"disk_needed": 2, "disk_free": 1}, "does not fit"),
    ):
        found = Found(**change)
        said = hindrance(found)
        assert said is not None
        assert said.word == word
        assert verdict(found) == said
