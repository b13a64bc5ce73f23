"""A figure with what lies around it."""

from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple


class Spread(NamedTuple):
    """A median, what lies around it, and of how many."""

    median: float
    low: float  # quartiles of requests; the least and the most of rounds
    high: float
    n: int

    def scaled(self, factor: float) -> "Spread":
        """In another unit."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.n)


def quartiles(values: Sequence[float]) -> Spread:
    """The median, between the quartiles."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0], 1)
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def extremes(values: Sequence[float]) -> Spread:
    """The median, between the least and the most."""
    return Spread(median(values), min(values), max(values), len(values))
