"""What a scorecard says in a word."""

import pytest

from opcd.evaluation.intervals import PerRequest, paired_difference, wilson_interval
from opcd.evaluation.verdict import Verdict, verdict


def right(share: float, n: int, shift: int = 0) -> PerRequest:
    """Answers of n requests, of which a share is right, the first ones behind `shift`."""
    count = round(share * n)
    return PerRequest([float(count > (i - shift) % n) for i in range(n)], [1.0] * n)


def judged(
    base: float,
    prompted: float,
    distilled: float,
    n: int = 200,
    shift: int = 0,  # of the requests that base is right on
    reference: str = "prompted",
    constant: float | None = None,  # accuracy of one answer for all
    **rates: tuple[float, float],
) -> dict:
    """A card of models that are right on the same requests, as far as they are right."""
    values = {
        "base": right(base, n, shift),
        reference: right(prompted, n),
        "distilled": right(distilled, n),
    }
    columns = {
        name: {
            "accuracy": x.mean,
            "accuracy_interval_95": wilson_interval(sum(x.totals), n),
            "n": n,
        }
        for name, x in values.items()
    }
    columns.setdefault("prompted", columns["base"])
    for place, name in enumerate((reference, "distilled")):
        columns[name]["rates"] = {k: {"mean": v[place], "n": 100} for k, v in rates.items()}
    pairs = {
        "gain": (reference, "base"),
        "learned": ("distilled", "base"),
        "left": ("distilled", reference),
    }
    differences = {
        name: paired_difference(values[a], values[b]).summary() for name, (a, b) in pairs.items()
    }
    card: dict = {"contenders": columns, "differences": differences}
    return card if constant is None else card | {"constant": {"answer": "a", "accuracy": constant}}


@pytest.mark.parametrize(
    ("card", "word"),
    [
        (judged(0.0, 0.85, 0.9), "learned"),
        (judged(0.0, 0.85, 0.84), "learned"),  # not below it beyond chance
        (judged(0.0, 0.85, 0.81), "learned in part"),  # 8 requests lost and none won
        (judged(0.0, 0.85, 0.7), "learned in part"),
        (judged(0.0, 0.85, 0.0), "not learned"),
        (judged(0.4, 0.85, 0.42), "not learned"),
        (judged(0.5, 0.52, 0.5), "nothing to learn"),  # 4 requests won
        (judged(0.5, 0.55, 0.5), "not learned"),  # 10, and none lost
        (judged(0.5, 0.55, 0.5, shift=50), "nothing to learn"),  # 10 net, of 100 that changed
        (judged(0.5, 0.52, 0.7), "learned"),
        (judged(0.5, 0.85, 0.1), "worse than before"),
        (judged(0.9, 0.9, 0.1), "worse than before"),
        (judged(0.98, 0.98, 0.98), "nothing to learn"),
        (judged(0.0, 0.85, 0.85, n=20), "learned"),
        (judged(0.0, 0.85, 0.85, n=19), "too few requests"),
        (judged(0.0, 1.0, 1.0, n=1), "too few requests"),
        (judged(0.2, 0.8, 0.6, n=20), "learned in part"),
        (judged(0.0, 0.75, 0.75, a=(0.8, 0.8), b=(0.7, 0.7)), "learned"),
        (judged(0.0, 0.75, 0.75, a=(0.8, 0.3), b=(0.7, 1.0)), "learned in part"),
        (judged(0.1, 0.9, 0.6, reference="teacher"), "learned in part"),
        (judged(0.1, 0.9, 0.11, reference="teacher"), "not learned"),
        (judged(0.1, 0.9, 0.9, reference="teacher"), "learned"),
        (judged(0.0, 0.26, 0.315, constant=0.28), "nothing to learn"),  # the prompt says one thing
        (judged(0.0, 0.85, 0.31, constant=0.28), "not learned"),
        (judged(0.0, 0.85, 0.38, constant=0.28), "learned in part"),
        (judged(0.0, 0.96, 0.955, constant=0.9), "learned"),
        (judged(0.3, 0.85, 0.1, constant=0.28), "worse than before"),
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


@pytest.mark.parametrize("distilled", [0.0, 0.7])
def test_no_run_is_told_to_set_what_it_has_set(distilled: float) -> None:
    card = judged(0.0, 0.85, distilled)
    assert "guided_share" in verdict(card).advice
    assert "guided_share" not in verdict(card, guided_share=0.25).advice
    assert verdict(card, guided_share=0.25).advice


@pytest.mark.parametrize(("kept", "warned"), [(0, True), (90, True), (140, False), (290, False)])
def test_what_is_lost_elsewhere_is_said_with_the_advice(kept: int, warned: bool) -> None:
    card = judged(0.0, 0.85, 0.9)
    before = verdict(card)
    share = {"mean": kept / 300, "interval_95": wilson_interval(kept, 300)}
    found = verdict(card | {"elsewhere": {"agreement": share}})
    assert (found.word, found.reason) == (before.word, before.reason)
    said = f"; use it for requests like these only: of its answers to others {kept / 300:.0%} ("
    assert found.advice.startswith(before.advice)
    assert (said in found.advice) == warned


def unjudged(
    before: float,
    after: float,
    agreed: float = 0.0,
    agrees: float = 0.5,
    n: int = 100,
    spread: float = 0.2,  # of requests: every other one has so much more than the mean
) -> dict:
    """A card of requests whose gaps shrink in the same measure."""
    shape = [1 - spread if i % 2 else 1 + spread for i in range(n)]
    each = [10.0] * n
    gaps = {
        name: PerRequest([10 * gap * x for x in shape], each)
        for name, gap in (("base", before), ("distilled", after))
    }
    columns = {
        name: {
            "gap": gaps[name].summary(),
            "greedy_agreement": {"mean": share, "interval_95": wilson_interval(n * share, n)},
        }
        for name, share in (("base", agreed), ("distilled", agrees))
    }
    closed = paired_difference(gaps["base"], gaps["distilled"])
    return {"contenders": columns, "differences": {"gap_closed": closed.summary()}}


@pytest.mark.parametrize(
    ("card", "word"),
    [
        (unjudged(2.5, 0.49), "learned"),
        (unjudged(2.5, 0.51), "learned in part"),
        (unjudged(2.5, 2.1), "learned in part"),  # every request is a little nearer
        (unjudged(0.3, 0.15, spread=0.9), "learned in part"),  # the intervals overlap
        (unjudged(2.5, 0.1, spread=0.95, n=20), "learned"),
        (unjudged(2.5, 2.5), "not learned"),
        (unjudged(0.5, 2.5), "worse than before"),
        (unjudged(0.015, 0.01, agreed=0.98), "nothing to learn"),
        (unjudged(0.015, 0.01, agreed=1.0, n=20), "nothing to learn"),
        (unjudged(0.015, 0.01, agreed=1.0, n=19), "too few requests"),
        (unjudged(0.015, 0.01, agreed=0.5), "learned"),
        (unjudged(2.5, -0.4), "learned"),
        (unjudged(2.5, -0.6), "learned in part"),  # it says it, and too surely
    ],
)
def test_by_the_gap(card: dict, word: str) -> None:
    found = verdict(card)
    assert found.word == word
    assert Verdict(**found._asdict()) == found
