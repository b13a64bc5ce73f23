"""A round is kept where it is better beyond chance, and holds elsewhere."""

import pytest

from opcd.evaluation.intervals import PerRequest
from opcd.experience.gate import decide, one_sided
from opcd.experience.measuring import Measured, agreement, more_right


def measured(right: int, n: int = 300) -> Measured:
    return Measured([1.0] * right + [0.0] * (n - right), {}, [])


def changed(wins: int, losses: int, same: int = 240) -> tuple[Measured, Measured]:
    """Answers before and after, of which some became right and some wrong."""
    before = [0.0] * wins + [1.0] * losses + [1.0] * same
    after = [1.0] * wins + [0.0] * losses + [1.0] * same
    return Measured(before, {}, []), Measured(after, {}, [])


def agreed(same: int, n: int = 300) -> PerRequest:
    return PerRequest([1.0] * same + [0.0] * (n - same), [1.0] * n)


NOTHING = agreement([], [])


@pytest.mark.parametrize(("wins", "accepted"), [(30, False), (35, False), (36, True), (24, False)])
def test_at_300_problems_and_60_changed_answers(wins: int, accepted: bool) -> None:
    """+4 points are needed: 36 against 24. How often coins fall so, by their paths."""
    before, after = changed(wins, 60 - wins)
    found = decide(before, after, NOTHING, NOTHING, 0.03)
    assert found.accepted == accepted, found.reason
    apart = more_right(after, before)
    assert apart is not None
    paths = {0: 1}  # of wins so far: how many sequences of coins lead there
    for _ in range(60):
        paths = {k: paths.get(k, 0) + paths.get(k - 1, 0) for k in range(len(paths) + 1)}
    by_chance = sum(n for k, n in paths.items() if k >= wins) / 2**60
    if wins > 30:
        assert one_sided(apart) == pytest.approx(by_chance)
    assert (one_sided(apart) <= 0.10) == (by_chance <= 0.10) == accepted


def test_elsewhere_may_fall_by_three_points_and_not_beyond_doubt_by_more() -> None:
    before, after = changed(60, 0)
    for same, accepted in ((300, True), (291, True), (285, True), (270, False)):
        found = decide(before, after, agreed(300), agreed(same), 0.03)
        assert found.accepted == accepted, found.reason
    assert "worse elsewhere" in found.reason
    assert decide(before, after, agreed(300), agreed(270), 0.2).accepted
    # Against the weights that the round began with, not against the original.
    assert decide(before, after, agreed(270), agreed(268), 0.03).accepted


def test_what_could_not_be_judged_afterwards_does_not_count_for_it() -> None:
    """Weights that make a checker raise are not better for it."""
    before = Measured([None, 0.0, 0.0, 1.0], {"crashed": 1}, [])
    after = Measured([1.0, 1.0, None, 1.0], {"crashed": 1}, [])
    apart = more_right(after, before)
    assert apart is not None
    assert (apart.requests, apart.mean) == (3, pytest.approx(1 / 3))
    before = Measured([0.0] * 200, {}, [])
    after = Measured([1.0] * 4 + [0.0] + [None] * 195, {"raised": 195}, [])
    lost = Measured([1.0] * 100 + [0.0] * 100, {}, [])
    assert not decide(lost, after, NOTHING, NOTHING, 0.03).accepted
    assert decide(before, after, NOTHING, NOTHING, 0.03).figures["better"]["requests"] == 200
    unknown = Measured([None] * 200, {}, [])
    assert not decide(before, unknown, NOTHING, NOTHING, 0.03).accepted
    assert unknown.summary()["accuracy"] is None
