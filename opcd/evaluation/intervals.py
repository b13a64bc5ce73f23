"""Means over requests, and how sure they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

RESAMPLES = 2000


class PerRequest(NamedTuple):
    """What each request adds to a mean: nats over its tokens, or a value over 1."""

    totals: Sequence[float]
    counts: Sequence[float]

    @property
    def mean(self) -> float:
        """``sum(totals) / sum(counts)``."""
        return sum(self.totals) / sum(self.counts)

    def summary(self, share: bool = False) -> dict[str, Any]:
        """The mean and its interval, as files hold them.

        share: of values from 0 to 1, one a request; the interval is then Wilson's, for drawn anew 0
            of 300 would be 0 for certain.
        """
        n = len(self.totals)
        interval = (
            wilson_interval(sum(self.totals), n)
            if share
            else bootstrap_interval(self.totals, self.counts)
        )
        return {"mean": self.mean, "interval_95": interval, "requests": n}


def bootstrap_interval(totals: Sequence[float], counts: Sequence[float]) -> list[float]:
    """95 % percentile interval of ``sum(totals) / sum(counts)``, drawn anew over requests.

    totals: what each request adds up to, such as nats over its tokens.
    counts: what each request is divided by, such as its number of tokens; 1 for means of requests.
    The same draws at every call (Efron and Tibshirani, 1993, chapter 13).
    """
    n = len(totals)
    values = torch.tensor([list(totals), list(counts)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    sums = torch.empty(2, RESAMPLES, dtype=torch.float64)
    for i in range(RESAMPLES):
        drawn = torch.randint(n, (n,), generator=generator)
        sums[:, i] = values[:, drawn].sum(1)
    means = sums[0] / sums[1]
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [low, high]


def wilson_interval(successes: float, n: int, z: float = 1.959964) -> list[float]:
    """95 % score interval of a proportion (Wilson, 1927); honest at 0 and 1 too.

    Of the mean of values between 0 and 1, too, and then too wide rather than too narrow: with that
    mean nothing varies more than values that are 0 or 1.
    """
    p = successes / n
    centre = p + z * z / (2 * n)
    spread_ = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + s) / (1 + z * z / n) for s in (-spread_, spread_))
    return [max(0.0, low), min(1.0, high)]
