"""The seconds of a call's rounds: what a benchmark is handed to time with.

Nothing but pytest is needed, so that an environment that trains can also be measured; each row is
written when it is made, so that a benchmark that dies or is stopped leaves the rows before it.
"""

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any


class Rounds:
    """Times a call, and holds what is found besides (`facts`)."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.facts: dict[str, Any] = {}

    def time(
        self,
        call: Callable[[], object],  # returns when its work is done, on a GPU too
        rounds: int,
        before: Callable[[], object] = lambda: None,  # each round, not timed
    ) -> None:
        """Time `call`, once a round."""
        for _ in range(rounds):
            before()
            start = time.perf_counter()
            call()
            self.seconds.append(time.perf_counter() - start)

    def given(self, seconds: Iterable[float]) -> None:
        """What was timed elsewhere, round by round."""
        self.seconds += seconds

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    def row(self) -> dict[str, Any]:
        """The facts, the number of rounds, and median, extremes and quartiles of their seconds."""
        first, _, third = (
            statistics.quantiles(self.seconds, n=4, method="inclusive")
            if len(self.seconds) > 1
            else self.seconds * 3
        )
        times = {
            "median_s": self.median,
            "min_s": min(self.seconds),
            "q1_s": first,
            "q3_s": third,
            "max_s": max(self.seconds),
        }
        rounded = {k: float(f"{x:.4g}") for k, x in times.items()}
        return {**self.facts, **rounded, "rounds": len(self.seconds)}
