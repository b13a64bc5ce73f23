"""How sure a mean over requests is."""

from collections.abc import Sequence

import torch

RESAMPLES = 2000


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
    means = sums[0] / sums[1].clamp_min(1e-300)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return [low, high]
