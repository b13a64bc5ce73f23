"""A process that holds games: see `environments`.

``python -m opcd.experience.games.worker GAME SECONDS``

A question is one call of a game, which is told by a number. Whoever asks goes on with a game that
is not held, or not as far as that, by telling it anew.
"""

import sys
from collections import OrderedDict
from typing import Any

from opcd.errors import InputError
from opcd.experience.games.by_name import load_environment
from opcd.experience.games.environment import Environment, reset, step
from opcd.runtime.user_code import raised
from opcd.runtime.workers import Answering, serve

MOST_HELD = 4096  # games; those that were not played for longest go first
NOT_HELD: dict[str, Any] = {"held": False}


class Games:
    """Those that are being played, by their numbers, and how many answers they were given."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._make = load_environment(spec)
        self._held: OrderedDict[int, tuple[Environment, int]] = OrderedDict()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """How a game begins, or what comes of an answer. Raises InputError where it fails."""
        seed = asked["seed"]
        try:
            return self._stepped(**asked) if "action" in asked else self._begun(**asked)
        except InputError as error:
            raise InputError(f"game {self._spec} with seed {seed}: {error}") from error
        except (Exception, SystemExit) as error:  # whatever the user's game raises
            raise InputError(
                f"game {self._spec} with seed {seed} raised {raised(error)}; correct it"
            ) from error

    def _begun(self, seed: int, number: int | None = None) -> dict[str, Any]:
        """A game without a number is only looked at."""
        game = self._make()
        text, key = reset(game, seed)
        if number is not None:
            self._hold(number, game, 0)
        return {"observation": text, "key": key}

    def _stepped(self, number: int, seed: int, turn: int, action: str) -> dict[str, Any]:
        game, given = self._held.pop(number, (None, 0))
        if game is None or given != turn:
            return NOT_HELD
        found = step(game, action)
        if not found.done:
            self._hold(number, game, turn + 1)
        return found._asdict()

    def _hold(self, number: int, game: Environment, given: int) -> None:
        self._held[number] = game, given
        if len(self._held) > MOST_HELD:
            self._held.popitem(last=False)


def main() -> None:
    """Answer for games."""
    spec, seconds = sys.argv[1], float(sys.argv[2])

    def load() -> Answering:
        return Games(spec).answer

    serve(load, seconds)


if __name__ == "__main__":
    main()
