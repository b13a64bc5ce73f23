"""The options of a divergence, checked once and handed down as one value."""

from typing import NamedTuple

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
# What else can be computed: both KL in shares of a token, or (no token has a weight) none.
KINDS = (*DIVERGENCES, "mixture", "none")


class Options(NamedTuple):
    """What is computed, whatever computes it."""

    divergence: str  # one of KINDS
    beta: float
    temperature: float
    student_softcap: float | None
    teacher_softcap: float | None
    vocab_size: int  # V: the first rows of both heads
