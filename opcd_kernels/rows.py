"""Rows of logits: what is asked of each, and what is found."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What is asked of the C tokens of a chunk; factors are what gradients are multiplied with."""

    factors: Tensor  # (C,) of the divergence; where 0, the teacher's row may hold anything
    forward_shares: Tensor | None = None  # (C,) of a mixture
    target_ids: Tensor | None = None  # (C,) int64
    target_factors: Tensor | None = None  # (C,) of −log p_s(target)

    def part(self, rows: slice) -> "Rows":
        factors, *others = self
        return Rows(factors[rows], *(None if x is None else x[rows] for x in others))

    @property
    def dropped(self) -> Tensor:  # (C,) bool
        """The rows of which nothing is asked, and which may hold anything."""
        unweighted = self.factors == 0
        if self.target_factors is None:
            return unweighted
        return unweighted & (self.target_factors == 0)


class Found(NamedTuple):
    """What came out; 0 where a row has no factor of it."""

    dz: Tensor  # (C, V) the gradient in the student's logits
    per_token: Tensor  # (C,)
    entropy: Tensor  # (C,)
    reverse_kl: Tensor  # (C,) of a mixture, like the next
    forward_kl: Tensor  # (C,)
    logprobs: Tensor  # (C,) log p_s(target), where there are targets

    def part(self, rows: slice) -> "Found":
        return Found(*(x[rows] for x in self))


def empty_found(dz: Tensor, rows: Rows) -> Found:
    """Uninitialised values beside the memory of the gradient."""
    return Found(dz, *(torch.empty_like(rows.factors) for _ in Found._fields[1:]))


def mixed(reverse_kl: Tensor, forward_kl: Tensor, shares: Tensor) -> Tensor:
    """(1 − a) · reverse + a · forward; one that has no part in it may be infinite."""
    reverse = torch.where(shares < 1, (1 - shares) * reverse_kl, 0)
    return reverse + torch.where(shares > 0, shares * forward_kl, 0)
