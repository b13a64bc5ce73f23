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

    def placed(x: Tensor | None) -> Tensor | None:
        return None if x is None else _moved(counting(x), device)

    if forward_shares is not None:
        _check_inside("forward_share", counting(forward_shares), 0, 1)
    if target_ids is not None and known:
        _check_inside("target_ids", counting(target_ids), 0, vocab_size - 1)
    no_divergence = token_weights.device.type == "cpu" and not token_weights.any()
    token_weights = _moved(counting(token_weights), device)
    target_ids, logprob_weights = placed(target_ids), placed(logprob_weights)
    if target_ids is not None and not known:  # the dropped ones are still there
        dropped = token_weights == 0
        if logprob_weights is not None:
            dropped &= logprob_weights == 0
        target_ids = target_ids.masked_fill(dropped, 0)
        _check_inside("target_ids", target_ids, 0, vocab_size - 1)
    return Tokens(
        *(kept, token_weights, placed(forward_shares)),
        *(target_ids, logprob_weights, no_divergence),
    )


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
    return x.pin_memory().to(device, non_blocking=True)
