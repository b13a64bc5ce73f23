"""The verdict before a run: which reason comes first, and where each one ends."""

import pytest

from opcd.preflight.verdict import Found, verdict

GOES = Found(
    requests=64,
    changed=0.9,
    changed_interval=(0.8, 0.95),
    gap=2.0,
    gap_interval=(1.8, 2.2),
    hard_tokens=0.4,
    cut=0.0,
    empty=0.0,
    base=0.1,
    base_interval=(0.05, 0.2),
    prompted=0.8,
    prompted_interval=(0.7, 0.88),
    constant=0.3,
)
UNJUDGED = GOES._replace(
    base=None, base_interval=None, prompted=None, prompted_interval=None, constant=None
)


@pytest.mark.parametrize(
    ("change", "word", "says"),
    [
        ({}, "go", "accuracy 10% without the prompt, 80% with it"),
        ({"wrong_inputs": "p.jsonl:3: the teacher's prompt"}, "wrong inputs", "p.jsonl:3"),
        ({"needed_bytes": 12 * 10**9, "room_bytes": 8 * 10**9}, "does not fit", "12.0 GB of 8.0"),
        (
            {"needed_bytes": 2, "fits_with": "gradient_checkpointing to true"},
            "does not fit",
            "; set gradient_checkpointing to true",
        ),
        ({"cut": 0.51}, "the prompt does not work", "cut at max_completion_tokens (51% of 64)"),
        ({"empty": 0.6}, "the prompt does not work", "empty (60% of 64)"),
        ({"prompted_interval": (0.2, 0.9)}, "the prompt does not work", "nothing beyond chance"),
        ({"constant": 0.7}, "the prompt does not work", "the commonest answer alone has 70%"),
        (
            {"changed_interval": (0.1, 0.3), "gap_interval": (0.05, 0.06)},
            "the prompt changes nothing",
            "leave it out",
        ),
        ({"changed_interval": (0.1, 0.3), "gap_interval": (0.051, 0.06)}, "go", ""),
        ({"pays_after": 5000.0, "expected_requests": 4999.0}, "keep the prompt", "4,999 expected"),
        ({"pays_after": 5000.0, "expected_requests": 5000.0}, "go", ""),
        ({"pays_after": 5000.0}, "go", ""),
        ({"hard_tokens": 3.0}, "needs guided rollouts", "; set guided_share to 0.25"),
        ({"hard_tokens": 3.0, "guided_share": 0.25}, "go", ""),
    ],
)
def test_one_reason_at_a_time(change: dict, word: str, says: str) -> None:
    found = verdict(GOES._replace(**change))
    assert found.word == word
    assert says in str(found)
    assert found.goes == (word == "go")


def test_the_first_reason_counts() -> None:
    worst = GOES._replace(
        wrong_inputs="x", needed_bytes=2, cut=1.0, hard_tokens=9.0, gap_interval=(0.0, 0.0)
    )
    assert verdict(worst).word == "wrong inputs"
    assert verdict(worst._replace(wrong_inputs="")).word == "does not fit"


def test_without_answers() -> None:
    assert verdict(UNJUDGED).word == "go"
    assert "accuracy" not in str(verdict(UNJUDGED))
    assert verdict(UNJUDGED._replace(hard_tokens=4.0)).word == "needs guided rollouts"
