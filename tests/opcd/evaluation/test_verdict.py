"""What a scorecard says in a word."""

import pytest

from opcd.evaluation.intervals import wilson_interval
from opcd.evaluation.verdict import Verdict, verdict


def judged(base: float, prompted: float, distilled: float, **rates: tuple[float, float]) -> dict:
    columns = {
        name: {"accuracy": value, "accuracy_interval_95": wilson_interval(200 * value, 200)}
        for name, value in (("base", base), ("prompted", prompted), ("distilled", distilled))
    }
    for place, name in enumerate(("prompted", "distilled")):
        columns[name]["rates"] = {k: {"mean": v[place], "n": 100} for k, v in rates.items()}
    return {"contenders": columns}


@pytest.mark.parametrize(
    ("card", "word"),
    [
        (judged(0.0, 0.85, 0.9), "learned"),
        (judged(0.0, 0.85, 0.81), "learned"),  # not below it beyond chance
        (judged(0.0, 0.85, 0.7), "learned in part"),
        (judged(0.0, 0.85, 0.0), "not learned"),
        (judged(0.4, 0.85, 0.42), "not learned"),
        (judged(0.5, 0.55, 0.5), "nothing to learn"),
        (judged(0.5, 0.55, 0.7), "learned"),
        (judged(0.0, 0.75, 0.75, a=(0.8, 0.8), b=(0.7, 0.7)), "learned"),
        (judged(0.0, 0.75, 0.75, a=(0.8, 0.3), b=(0.7, 1.0)), "learned in part"),
    ],
)
def test_by_accuracy(card: dict, word: str) -> None:
    assert verdict(card).word == word


def test_a_lost_rate_is_named() -> None:
    """A bank's policy at which a model refuses everything is half right."""
    found = verdict(judged(0.0, 0.7, 0.75, **{"in scope": (0.8, 0.5), "out": (0.6, 1.0)}))
    assert "but in scope 80.0% → 50.0%" in found.reason
    assert str(found).startswith("Learned in part: ")
    assert str(found).endswith("; train longer, or with guided_share 0.25")


@pytest.mark.parametrize(("kept", "warned"), [(0, True), (90, True), (140, False), (290, False)])
def test_what_is_lost_elsewhere_is_said_with_the_advice(kept: int, warned: bool) -> None:
    card = judged(0.0, 0.85, 0.9)
    before = verdict(card)
    share = {"mean": kept / 300, "interval_95": wilson_interval(kept, 300)}
    found = verdict(card | {"elsewhere": {"agreement": share}})
    assert (found.word, found.reason) == (before.word, before.reason)
    said = f"; give it such requests alone: on others {kept / 300:.0%} ("
    assert found.advice.startswith(before.advice)
    assert (said in found.advice) == warned


def unjudged(before: float, after: float, agreed: float = 0.0, agrees: float = 0.5) -> dict:
    return {
        "contenders": {
            name: {
                "gap": {"mean": gap, "interval_95": [0.9 * gap, 1.1 * gap]},
                "greedy_agreement": {
                    "mean": share,
                    "interval_95": wilson_interval(100 * share, 100),
                },
            }
            for name, gap, share in (("base", before, agreed), ("distilled", after, agrees))
        }
    }


@pytest.mark.parametrize(
    ("card", "word"),
    [
        (unjudged(2.5, 0.49), "learned"),
        (unjudged(2.5, 0.51), "learned in part"),
        (unjudged(2.5, 2.1), "not learned"),
        (unjudged(0.015, 0.01, agreed=0.98), "nothing to learn"),
        (unjudged(0.015, 0.01, agreed=0.5), "learned"),
    ],
)
def test_by_the_gap(card: dict, word: str) -> None:
    found = verdict(card)
    assert found.word == word
    assert Verdict(**found._asdict()) == found
