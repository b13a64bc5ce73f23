"""What a run tells whoever started it."""

from typing import Any


class Progress:
    """What a run tells, and what it asks; this one is silent and never stops a run."""

    def say(self, text: str) -> None:
        """Lines for people."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """A phase of `total` parts begins, `done` of them made before."""

    def part(self, note: str, metrics: dict[str, Any] | None = None) -> None:
        """One part of the phase is done; a training step hands over its metrics."""

    def validated(self, metrics: dict[str, Any]) -> None:
        """A step whose part was done was measured after all: training ends with it."""

    def end(self) -> None:
        """The phase ends, whether or not all its parts were done."""

    def stop(self) -> str | None:
        """Asked after every step: why the run should end here, or None to go on."""
        return None

    def enough(self) -> bool:
        """Asked after every step: whether training should end here, with a model."""
        return False
