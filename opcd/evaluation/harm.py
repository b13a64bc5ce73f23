"""What a context does to a model that does without it.

A distilled model is served without its prompt; where a client sends it all the same, answers that
were right can become wrong (arXiv 2606.11627, "When Context Returns").
"""

from collections.abc import Sequence
from typing import Any

from opcd.evaluation.intervals import PerRequest


def harm(without: Sequence[float], with_context: Sequence[float]) -> dict[str, Any] | None:
    """The share of what is right without the context that is wrong with it; None if nothing is.

    Both are values of the same requests, from 0 to 1. Of values between, what is lost of each:
    a model that answers the same both times has harm 0 whatever it answers.
    """
    pairs = [(a, b) for a, b in zip(without, with_context, strict=True) if a > 0]
    if not pairs:
        return None
    lost = PerRequest([max(a - b, 0.0) for a, b in pairs], [a for a, _ in pairs])
    one_each = all(value in (0, 1) for pair in pairs for value in pair)
    return {"of": "right without the context", **lost.summary(share=one_each)}


def disagreement(without: Sequence[str], with_context: Sequence[str]) -> dict[str, Any]:
    """Where nothing says what is right: the share of answers that are others with the context."""
    other = [float(a != b) for a, b in zip(without, with_context, strict=True)]
    return {"of": "all answers", **PerRequest(other, [1] * len(other)).summary(share=True)}
