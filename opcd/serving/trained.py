"""What a run's own files say of it, as far as a server's figures are held against that."""

from pathlib import Path
from typing import NamedTuple

from opcd.errors import InputError
from opcd.evaluation.evaluate import read_scorecard
from opcd.runtime.files import read_metrics
from opcd.training.export import read_selection


class Trained(NamedTuple):
    """A run that has ended."""

    word: str | None  # of the scorecard's verdict; None where nothing was scored
    answer_tokens: int  # as many as the prompted model's answers have, or as there may be
    seconds: float | None  # of its steps and validations; None where nothing says
    device: str | None  # on which they were, by its name


def read_trained(run: Path, max_completion_tokens: int) -> Trained:
    """Of a run's folder. Raises InputError for files that opcd did not write."""
    card, rows = read_scorecard(run) or {}, read_metrics(run / "metrics.jsonl")
    selection = read_selection(run)
    try:
        prompted = card.get("contenders", {}).get("prompted", {})
        mean = float(prompted.get("mean_completion_tokens", max_completion_tokens))
        word, device = (
            found.get(name)
            for found, name in (
                (card.get("verdict", {}), "word"),
                (selection.get("trained_by", {}), "device"),
            )
        )
        seconds = sum(float(row.get("step_time_s", 0.0)) for row in rows)
        seconds += sum(float(row.get("validation", {}).get("time_s", 0.0)) for row in rows)
        tokens = max(1, min(max_completion_tokens, round(mean)))
        known = 0 < seconds < float("inf")
    except (AttributeError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(
            f"the files of {run} must be as opcd writes them, got {type(error).__name__}: {error}; "
            f"score the run again with opcd eval"
        ) from error
    return Trained(
        word if isinstance(word, str) else None,
        tokens,
        seconds if known else None,
        device if isinstance(device, str) else None,
    )
