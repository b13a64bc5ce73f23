"""Games in processes of their own, one a core: what hangs or crashes costs its own game alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

from opcd.experience.games.environment import Step
from opcd.experience.games.worker import NOT_HELD
from opcd.runtime.workers import RAISED, Answer, Lost, Workers


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
        self._spec = spec
        self._workers = Workers("opcd.experience.games.worker", [spec], seconds, workers)
        self._numbers = count()

    def __enter__(self) -> "Environments":
        self._workers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all of them."""
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
        new = [game for game in games if not game.actions]
        begun = self._ask([(game, {}) for game in new])
        found: dict[int, Step | Lost] = {
            game.number: lost
            for game, answer in zip(new, begun, strict=True)
            if (lost := self._changed(game, answer)) is not None
        }
        going = [it for it in zip(games, actions, strict=True) if it[0].number not in found]
        answers = self._ask([(game, _given(game, action)) for game, action in going])
        for (game, action), answer in zip(going, answers, strict=True):
            found[game.number] = self._came(game, action, answer)
        return [found[game.number] for game in games]

    def _came(self, game: Running, action: str, answer: Answer) -> Step | Lost:
        if answer == NOT_HELD:
            answer = self._again(game, action)
        if isinstance(answer, Lost):
            return answer
        came = Step(**answer)
        game.actions.append(action)
        game.shown = came.observation
        return came

    def _again(self, game: Running, action: str) -> Answer:
        """What comes of an answer in a game that is played anew, up to where it stood."""
        (answer,) = self._ask([(game, {})])
        for turn, earlier in enumerate(game.actions):
            if isinstance(answer, Lost):
                break
            (answer,) = self._ask([(game, {"turn": turn, "action": earlier})])
        if (lost := self._changed(game, answer)) is not None:
            return lost
        (answer,) = self._ask([(game, _given(game, action))])
        return answer

    def _ask(self, asked: Sequence[tuple[Running, dict[str, Any]]]) -> list[Answer]:
        """One call of each game."""
        each = [{"number": game.number, "seed": game.seed} | call for game, call in asked]
        return self._workers.ask_same(each, [game.number for game, _ in asked])

    def _changed(self, game: Running, answer: Answer) -> Lost | None:
        """A game that does not stand where it stood before."""
        if isinstance(answer, Lost):
            return answer
        over = answer == NOT_HELD or answer.get("done", False)
        if not over and answer["observation"] == game.shown:
            return None
        now = "its end" if over else repr(answer["observation"][:80])
        return Lost(
            RAISED,
            f"game {self._spec} with seed {game.seed} must be the same for the same seed and "
            f"answers, got {now} where it was {game.shown[:80]!r} before; draw from "
            f"random.Random(seed), and keep nothing between games",
        )


def _given(game: Running, action: str) -> dict[str, Any]:
    return {"turn": len(game.actions), "action": action}
