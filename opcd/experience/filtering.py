"""Which candidate is worth distilling: each is scored on the validation problems."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from opcd.experience.measuring import Measured, more_right

Score = Callable[[Path], Measured]


def scored(candidates: Sequence[dict[str, Any]], folder: Path, score: Score) -> list[Measured]:
    """What the model as it is reaches behind each candidate's file."""
    return [score(folder / candidate["file"]) for candidate in candidates]


def ranked(
    candidates: Sequence[dict[str, Any]], found: Sequence[Measured], without: Measured, count: int
) -> dict[str, Any]:
    """All candidates with what they reached, the best first, and the `count` that are distilled.

    Those are of the best one's kind, since contexts of both kinds stand in different places, and
    better than no experience; none where no candidate is.
    """
    rows = [
        {
            **candidate,
            **measured.summary(),
            "more_than_without": apart.summary() if apart is not None else None,
        }
        for candidate, measured in zip(candidates, found, strict=True)
        for apart in [more_right(measured, without)]
    ]
    rows.sort(key=lambda row: -_gain(row))
    winners = [row for row in rows if _gain(row) > 0 and row["kind"] == rows[0]["kind"]]
    return {
        "without": without.summary(),
        "candidates": rows,
        "winners": [row["file"] for row in winners[:count]],
    }


def _gain(row: dict[str, Any]) -> float:
    """How much more often it is right than without; one that nobody could judge comes last."""
    apart = row["more_than_without"]
    return apart["mean"] if apart is not None else float("-inf")
