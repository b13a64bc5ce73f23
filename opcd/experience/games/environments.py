"""Games in processes of their own, one a core: what hangs or crashes costs its own game alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import NamedTuple

from opcd.experience.games.environment import Step
from opcd.runtime.workers import Lost, Workers


class Opening(NamedTuple):
    """How a game begins."""

    text: str  # what its player is told
    key: str  # the same for games that are one in different dress


@dataclass
class Running:
    """A game that is being played."""

    number: int  # among all
    seed: int
    shown: str  # what its player was told last
    actions: list[str] = field(default_factory=list)


class Environments:
    """Workers that hold games, each call within `seconds`; a context manager.

    A worker that hangs or crashes is replaced, and the game that it was asked for is lost; the
    others that it held are played again up to where they stood. Entering raises InputError for a
    game that cannot be loaded.
    """

    def __init__(self, spec: str, seconds: float, workers: int | None = None) -> None:
        self._workers = Workers("opcd.experience.games.worker", [spec], seconds, workers)
        self._numbers = count()

    def __enter__(self) -> "Environments":
        self._workers.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._workers.close()

    def openings(self, seeds: Sequence[int]) -> list[Opening | Lost]:
        """How the games of these seeds begin, in order."""
        answers = self._workers.ask([{"seed": seed} for seed in seeds])
        return [
            it if isinstance(it, Lost) else Opening(it["observation"], it["key"]) for it in answers
        ]

    def begin(self, seed: int, opening: str) -> Running:
        """A game to be played, of which it is known how it begins."""
        return Running(next(self._numbers), seed, opening)

    def step(self, games: Sequence[Running], actions: Sequence[str]) -> list[Step | Lost]:
        """What comes of an answer in each game, in order; one that is lost or over has no more."""
        asked = [
            {
                "number": game.number,
                "seed": game.seed,
                "actions": [*game.actions, action],
                "shown": game.shown,
            }
            for game, action in zip(games, actions, strict=True)
        ]
        answers = self._workers.ask_same(asked, [game.number for game in games])
        found: list[Step | Lost] = []
        for game, action, answer in zip(games, actions, answers, strict=True):
            if isinstance(answer, Lost):
                found.append(answer)
                continue
            came = Step(**answer)
            game.actions.append(action)
            game.shown = came.observation
            found.append(came)
        return found
