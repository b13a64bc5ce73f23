"""Bootstrap intervals against the normal approximation and by coverage."""

import math
import random

import pytest

from opcd.evaluation.intervals import (
    PerRequest,
    bootstrap_interval,
    mean_of_shares_interval,
    paired_difference,
    ratio_interval,
    wilson_interval,
)


def test_of_many_it_is_that_of_the_normal_distribution() -> None:
    draw = random.Random(0)
    values = [draw.gauss(3.0, 2.0) for _ in range(900)]
    low, high = bootstrap_interval(values, [1.0] * len(values))
    mean = sum(values) / len(values)
    assert abs((high - low) / 2 - 1.96 * 2.0 / 30) < 0.012
    assert abs((high + low) / 2 - mean) < 0.01
    assert [low, high] == bootstrap_interval(values, [1.0] * len(values))


def test_nats_over_tokens_cover_what_is_true() -> None:
    """Requests of 1 to 40 tokens with 0.3 nats each in the mean, 100 of them."""
    draw = random.Random(1)
    covered = 0
    for _ in range(60):
        counts = [float(draw.randint(1, 40)) for _ in range(100)]
        totals = [sum(draw.expovariate(1 / 0.3) for _ in range(int(n))) for n in counts]
        low, high = bootstrap_interval(totals, counts)
        covered += low <= 0.3 <= high
    assert 51 <= covered <= 60  # 57 expected


def test_equal_requests_leave_nothing_to_chance() -> None:
    low, high = bootstrap_interval([2.0] * 5, [4.0] * 5)
    assert math.isclose(low, 0.5)
    assert math.isclose(high, 0.5)


def test_nothing_of_many_is_not_certain() -> None:
    none = PerRequest([0.0] * 300, [1] * 300).summary(share=True)
    assert none == {"mean": 0.0, "interval_95": wilson_interval(0, 300), "requests": 300}
    assert none["interval_95"][1] > 0.01
    nats = PerRequest([0.0, 1.0] * 50, [2] * 100).summary()
    assert nats["interval_95"] == bootstrap_interval([0.0, 1.0] * 50, [2] * 100)


def answers(right: int, of: int) -> PerRequest:
    return PerRequest([1.0] * right + [0.0] * (of - right), [1] * of)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided and exact: of so many coins, how often as few fall on one side."""
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


@pytest.mark.parametrize(("gained", "lost"), [(5, 0), (6, 0), (4, 4), (9, 1), (20, 6), (30, 30)])
def test_right_or_wrong_is_mcnemars_test(gained: int, lost: int) -> None:
    before = PerRequest([0.0] * gained + [1.0] * lost + [1.0] * 40, [1] * (gained + lost + 40))
    after = PerRequest([1.0] * gained + [0.0] * lost + [1.0] * 40, before.counts)
    found = paired_difference(after, before)
    assert math.isclose(found.mean, (gained - lost) / (gained + lost + 40))
    assert math.isclose(found.p_value, mcnemar(gained, lost), rel_tol=1e-12)
    assert found.more == ((gained, lost) in ((6, 0), (9, 1), (20, 6)))
    back = paired_difference(before, after)
    assert (back.mean, back.p_value, back.less) == (-found.mean, found.p_value, found.more)


def test_the_same_requests_are_compared_where_intervals_overlap() -> None:
    """46 of 64 against 32 of 64, and nothing lost."""
    more, less = answers(46, 64), answers(32, 64)
    assert wilson_interval(46, 64)[0] < wilson_interval(32, 64)[1]
    found = paired_difference(more, less)
    assert found.more
    assert 0.1 < found.interval[0] < found.mean < found.interval[1] < 0.35


def test_few_requests_are_never_beyond_chance() -> None:
    assert not paired_difference(answers(5, 5), answers(0, 5)).more
    assert not paired_difference(answers(1, 1), answers(0, 1)).more


def test_chance_alone_is_beyond_chance_as_often_as_it_says() -> None:
    """Nats over tokens, skewed, 40 requests; 200 times."""
    draw, beyond = random.Random(2), 0
    for _ in range(200):
        counts = [float(draw.randint(1, 30)) for _ in range(40)]
        sides = [PerRequest([draw.expovariate(1.0) * n for n in counts], counts) for _ in range(2)]
        beyond += paired_difference(*sides).p_value < 0.05
    assert 2 <= beyond <= 20  # 10 expected


def test_other_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="the same counts"):
        paired_difference(PerRequest([1.0], [1]), PerRequest([1.0], [2]))


def test_exact_of_hundreds() -> None:
    """Where drawn signs would see none as far, the sum over all of them does."""
    found = paired_difference(answers(200, 220), answers(80, 220))
    assert math.isclose(found.p_value, 2.0**-119, rel_tol=1e-9)


def test_a_mean_of_rates_is_never_certain_and_covers() -> None:
    """Of one class it is Wilson's; of two, 95 % of what is drawn; of a constant answer, not 0."""
    assert mean_of_shares_interval([(0.25, 40)]) == pytest.approx(wilson_interval(10, 40))
    low, high = mean_of_shares_interval([(1.0, 20), (0.0, 20), (0.0, 20)])
    assert low < 1 / 3 - 0.03
    assert high > 1 / 3 + 0.06
    draw, covered = random.Random(3), 0
    for _ in range(300):
        rights = [sum(draw.random() < p for _ in range(n)) for p, n in ((0.9, 40), (0.3, 15))]
        low, high = mean_of_shares_interval([(rights[0] / 40, 40), (rights[1] / 15, 15)])
        covered += low <= 0.6 <= high
    assert 273 <= covered <= 297  # 285 expected


def test_a_ratio_is_known_where_its_whole_never_vanishes() -> None:
    half, whole = [0.5, 1.0] * 50, [1.0, 2.0] * 50
    assert ratio_interval(half, whole) == pytest.approx([0.5, 0.5])
    low, high = ratio_interval([1.0] * 80 + [0.0] * 20, [1.0] * 100) or [0.0, 0.0]
    assert low == pytest.approx(0.72, abs=0.02)
    assert high == pytest.approx(0.88, abs=0.02)
    assert ratio_interval([1.0] * 10, [1.0, -1.0] * 5) is None
