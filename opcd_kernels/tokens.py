"""The tokens that count: weights, shares and targets without those that nothing is asked of.

Leaving tokens out needs their number. Weights that live on a GPU are not waited for: all tokens are
kept, and the rows of weight 0 are skipped when their turn comes.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The n tokens that count, on one device."""

    kept: Tensor | None  # (n,) which they are; None: all
    weights: Tensor  # (n,)
    forward_shares: Tensor | None  # (n,) within [0, 1]
    target_ids: Tensor | None  # (n,) within the vocabulary
    logprob_weights: Tensor | None  # (n,)
    no_divergence: bool  # all weights are known to be 0: nothing depends on the teacher

    def scale(self) -> Tensor:  # ()
        """The power of two above the largest weight: relative to it 1/N is no fp16 underflow."""
        largest = self.weights.new_zeros(())
        for x in (self.weights, self.logprob_weights):
            if x is not None and len(x):
                largest = torch.maximum(largest, x.abs().max())
        return torch.exp2(torch.frexp(largest).exponent.clamp(max=127).to(largest.dtype))

    def loss(self, per_token: Tensor, logprobs: Tensor) -> Tensor:  # (N,), (N,) → ()
        """Σ weights · divergence − Σ logprob_weights · log p_s(target)."""
        if self.kept is not None:
            per_token = per_token[self.kept]
        loss = (self.weights * per_token).sum()
        if self.logprob_weights is None:
            return loss
        if self.kept is not None:
            logprobs = logprobs[self.kept]
        unweighted = self.logprob_weights == 0  # 0 · inf is not a number
        return loss - (self.logprob_weights * logprobs).masked_fill(unweighted, 0).sum()


def counting_tokens(
    token_weights: Tensor,  # (N,); this and the others on `device` or on the CPU
    forward_shares: Tensor | None,  # (N,)
    target_ids: Tensor | None,  # (N,)
    logprob_weights: Tensor | None,  # (N,)
    vocab_size: int,
    device: torch.device,
) -> Tokens:
    """Raise ValueError for a share or target out of range; on a GPU, assert on the device."""
    weights = [x for x in (token_weights, logprob_weights) if x is not None]
    known = all(x.device.type == "cpu" for x in weights)
    counts, kept = None, None
    if known:
        counts = torch.stack([x != 0 for x in weights]).any(0)
        if counts.all():
            counts = None
        else:
            kept = _moved(counts.nonzero()[:, 0], device)

    def counting(x: Tensor) -> Tensor:
        if counts is None or kept is None:
            return x
        return x[counts] if x.device.type == "cpu" else x[kept]

    no_divergence = token_weights.device.type == "cpu" and not token_weights.any()
    token_weights = _moved(counting(token_weights), device)
    if logprob_weights is not None:
        logprob_weights = _moved(counting(logprob_weights), device)

    def checked(name: str, x: Tensor | None, most: int) -> Tensor | None:
        if x is None:
            return None
        x = counting(x)
        if not known:  # the dropped ones are still there
            dropped = token_weights == 0
            if logprob_weights is not None:
                dropped = dropped & (logprob_weights == 0)
            x = _moved(x, device).masked_fill(dropped, 0)
        _check_inside(name, x, 0, most)
        return _moved(x, device)

    shares = checked("forward_share", forward_shares, 1)
    targets = checked("target_ids", target_ids, vocab_size - 1)
    return Tokens(kept, token_weights, shares, targets, logprob_weights, no_divergence)


def _check_inside(name: str, x: Tensor, low: int, high: int) -> None:
    inside = (x >= low) & (x <= high)
    if x.device.type != "cpu":  # nothing waits
        torch._assert_async(inside.all(), f"{name} must lie between {low} and {high}")
    elif not inside.all():
        outside = x[~inside][0].item()
        raise ValueError(
            f"{name} must lie between {low} and {high}, got {outside} in a token that counts; "
            f"correct it, or give the token weight 0"
        )


def _moved(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, without waiting for the queue of a GPU."""
    if x.device.type != "cpu" or device.type == "cpu":
        return x
    return x.contiguous().pin_memory().to(device, non_blocking=True)
