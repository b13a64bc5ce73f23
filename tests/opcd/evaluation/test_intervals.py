"""Bootstrap intervals against the normal approximation and by coverage."""

import math
import random

from opcd.evaluation.intervals import PerRequest, bootstrap_interval, wilson_interval


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
