"""Steps whose divergence stands out from those before them."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

# Prompts differ, and so do neighbouring steps, by a factor of two or three. In 35 runs of a study
# (studies/results/guided.jsonl) one step of 980 was above 5 times the median before it.
TIMES = 5.0
# Runs that went well end below it, where a multiple of the median is still a good step.
LEAST = 0.1  # nats a token
# Steps that the median is over: it must follow a divergence that falls. With the fewest, ten steps
# in a row can stand out before they are the median themselves.
WINDOW, FEWEST = 20, 10


class Spike(NamedTuple):
    """A step above `TIMES` the median of the steps before it."""

    step: int
    divergence: float  # nats a token
    median: float  # of the `WINDOW` steps before

    def __str__(self) -> str:
        return f"{self.divergence:.3f} in step {self.step}, the median before it {self.median:.3f}"


def spikes(rows: Sequence[Mapping[str, Any]]) -> list[Spike]:
    """Those of a run, from the rows of its metrics.jsonl.

    A step without completions of the student's own has no divergence and is left out; where no
    step has any, what is minimised on the guided ones counts.
    """
    values = _values(rows, "divergence") or _values(rows, "guided_loss")
    found = []
    for i, (step, value) in enumerate(values[FEWEST:], FEWEST):
        usual = median(x for _, x in values[max(0, i - WINDOW) : i])
        if value > max(LEAST, TIMES * usual):
            found.append(Spike(step, value, usual))
    return found


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]
