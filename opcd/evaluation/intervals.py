"""Means over requests, and how sure they are."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

RESAMPLES = 2000
AT_ONCE = 1 << 22  # of the numbers drawn: what they take of memory is bounded
EXACT = 12  # differences: of no more, all signs are tried
SIGNS = 9999  # that are drawn of more
CHANCE = 0.05  # what comes by chance less often counts as beyond it


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
    sums = _drawn_anew(totals, counts)
    return _middle(sums[0] / sums[1])


def _drawn_anew(totals: Sequence[float], counts: Sequence[float]) -> torch.Tensor:  # (2, RESAMPLES)
    """Sums of both over as many requests, drawn with replacement."""
    n = len(totals)
    values = torch.tensor([list(totals), list(counts)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.cat(
        [
            values[:, torch.randint(n, (resamples, n), generator=generator)].sum(-1)
            for resamples in _shares(RESAMPLES, AT_ONCE // n)
        ],
        dim=1,
    )


def _middle(values: torch.Tensor) -> list[float]:
    """Where the middle 95 % lie."""
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [low, high]


class Difference(NamedTuple):
    """How much more a mean is than another one over the same requests."""

    mean: float
    interval: list[float]  # 95 %
    p_value: float  # how often chance alone gives one as large, in either direction
    requests: int

    @property
    def more(self) -> bool:
        """Whether it is more beyond chance."""
        return self.mean > 0 and self.p_value < CHANCE

    @property
    def less(self) -> bool:
        """Whether it is less beyond chance."""
        return self.mean < 0 and self.p_value < CHANCE

    def summary(self) -> dict[str, Any]:
        """As files hold it."""
        return {
            "mean": self.mean,
            "interval_95": self.interval,
            "p_value": self.p_value,
            "requests": self.requests,
        }


def paired_difference(more: PerRequest, less: PerRequest) -> Difference:
    """The mean of `more` minus that of `less`, of the same requests in the same order.

    Two intervals that overlap say little of models that were asked the same: most of what makes
    them wide is the requests. So each request is compared with itself, and the p value is that of
    the differences with their signs drawn anew (Fisher's randomisation test). Of answers that are
    right or wrong it is McNemar's, and exact. Raises ValueError for other counts on either side.
    """
    if list(more.counts) != list(less.counts):
        raise ValueError("both sides must have the same counts a request; pass the same requests")
    apart = [a - b for a, b in zip(more.totals, less.totals, strict=True)]
    each = PerRequest(apart, more.counts)
    interval = bootstrap_interval(apart, more.counts)
    return Difference(each.mean, interval, _by_chance(apart), len(apart))


def _by_chance(differences: Sequence[float]) -> float:
    """Share of all signs, or of many that are drawn, with a sum as far from 0 as this one."""
    if not any(differences):
        return 1.0
    if len({abs(d) for d in differences if d}) == 1:
        return mcnemar(sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    moved = torch.tensor([d for d in differences if d], dtype=torch.float64)
    n = len(moved)
    found = moved.sum().abs() * (1 - 1e-9)  # sums of the same numbers differ in their last bit
    if n <= EXACT:
        bits = torch.arange(2**n)[:, None] >> torch.arange(n) & 1
        return ((1 - 2 * bits).double() @ moved).abs().ge(found).double().mean().item()
    generator = torch.Generator().manual_seed(0)
    as_far = 0
    for draws in _shares(SIGNS, AT_ONCE // n):
        bits = torch.randint(2, (draws, n), generator=generator)
        as_far += int(((1 - 2 * bits).double() @ moved).abs().ge(found).sum())
    return (1 + as_far) / (1 + SIGNS)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided exact p value of so many requests that are right on one side alone (McNemar, 1947).

    How often as many fair coins fall at least as unevenly: the randomisation test of differences
    that all have one size, over all signs.
    """
    n, few = gained + lost, min(gained, lost)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def _shares(total: int, most: int) -> list[int]:
    """A total in parts of at most so many, at least one each."""
    size = max(most, 1)
    return [min(size, total - done) for done in range(0, total, size)]


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


def mean_of_shares_interval(
    shares: Sequence[tuple[float, float]],  # each share, and of how many requests it is
) -> list[float]:
    """95 % interval of the unweighted mean of independent proportions, such as rates of classes.

    From the Wilson interval of each (Zou and Donner, 2008: variances recovered from limits).
    Drawn anew, a class of which all is right would be so for certain.
    """
    k = len(shares)
    mean = sum(share for share, _ in shares) / k
    limits = [(share, *wilson_interval(share * n, round(n))) for share, n in shares]
    below = math.sqrt(sum((share - low) ** 2 for share, low, _ in limits)) / k
    above = math.sqrt(sum((high - share) ** 2 for share, _, high in limits)) / k
    return [max(0.0, mean - below), min(1.0, mean + above)]


def ratio_interval(part: Sequence[float], whole: Sequence[float]) -> list[float] | None:
    """95 % interval of ``sum(part) / sum(whole)`` over requests, where the whole may vanish.

    None where it is 0 or less in some of what is drawn: the ratio is then anything.
    """
    sums = _drawn_anew(part, whole)
    return None if (sums[1] <= 0).any() else _middle(sums[0] / sums[1])
