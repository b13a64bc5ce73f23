"""The options of a divergence, checked once and handed down as one value."""

from typing import NamedTuple

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")


class Options(NamedTuple):
    """What is computed, whatever computes it."""

    divergence: str
    beta: float
    temperature: float
    student_softcap: float | None
    teacher_softcap: float | None
    vocab_size: int  # V: the first rows of both heads

    @property
    def plain(self) -> bool:
        """Whether nothing but a temperature stands between products and logits."""
        return self.student_softcap is None and self.teacher_softcap is None
