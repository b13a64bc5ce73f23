"""Packed sequences behind a prefix, and their attention by definition: each sequence alone."""

from typing import NamedTuple

import torch
from torch import Tensor

LENGTHS = (19, 17, 16, 5, 4, 1)


class Problem(NamedTuple):
    query: Tensor  # (N, H, D)
    key: Tensor  # (N, H_kv, D)
    value: Tensor  # (N, H_kv, D)
    prefix_key: Tensor  # (H_kv, S, D), the last S of P tokens
    prefix_value: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        return Problem(*(x.to(dtype) for x in self))


def problem(
    prefix: int, heads: int = 6, kv_heads: int = 2, width: int = 16, seed: int = 0
) -> Problem:
    """Random numbers that bf16 holds exactly, in fp64."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    return Problem(
        2 * normal(n, heads, width),
        normal(n, kv_heads, width),
        normal(n, kv_heads, width),
        normal(kv_heads, prefix, width),
        normal(kv_heads, prefix, width),
    )


def grouped() -> list[tuple[Problem, tuple[int, ...]]]:
    """Groups of sequences, each behind a prefix of its own; one stands behind none."""
    groups = ((19, 5), (17, 4, 1), (16,), (19,))
    parts = []
    for seed, (lengths, prefix) in enumerate(zip(groups, (13, 40, 0, 5), strict=True)):
        whole = problem(prefix, seed=seed)
        n = sum(lengths)
        own = (x[:n] for x in whole[:3])
        parts.append((Problem(*own, *whole[3:]), lengths))
    return parts


def oracle(
    p: Problem,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lengths: tuple[int, ...] = LENGTHS,
) -> Tensor:  # (N, H, D)
    """One sequence and one query at a time, over the keys that it sees, in the problem's dtype."""
    group = p.query.shape[1] // p.key.shape[1]
    outs, start, s = [], 0, p.prefix_key.shape[1]
    for length in lengths:
        own = slice(start, start + length)
        k = torch.cat([p.prefix_key, p.key[own].transpose(0, 1)], 1).repeat_interleave(group, 0)
        v = torch.cat([p.prefix_value, p.value[own].transpose(0, 1)], 1).repeat_interleave(group, 0)
        for i in range(length):
            first = max(0, s + i + 1 - window) if window is not None else 0
            seen = slice(first, s + i + 1)
            scores = torch.einsum("hd,hsd->hs", p.query[start + i], k[:, seen]) * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sinks is not None:
                scores = torch.cat([scores, sinks.to(scores.dtype)[:, None]], 1)
            shares = scores.softmax(-1)[:, : s + i + 1 - first]
            outs.append(torch.einsum("hs,hsd->hd", shares, v[:, seen]))
        start += length
    return torch.stack(outs)


VARIANTS = {
    "dense": {},
    "window": {"window": 7},
    "window-beyond-prefix": {"window": 30},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.linspace(-2, 3, 6)},
    "everything": {"window": 11, "softcap": 2.0, "sinks": torch.linspace(-2, 3, 6)},
}
