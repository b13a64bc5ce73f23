"""A process that holds games: see `environments`.

``python -m opcd.experience.games.worker GAME SECONDS``

A game is told by its seed and all answers so far, so that any process can go on with it: one that
does not hold it plays it up to there.
"""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from opcd.errors import InputError
from opcd.experience.games.environment import Environment, Step, load_environment, reset, step
from opcd.runtime.workers import Answering, serve

MOST_HELD = 4096  # games; those that were not played for longest go first


class _Held:
    """A game, and how it came to where it stands."""

    def __init__(self, make: Callable[[], Environment], seed: int) -> None:
        self._game = make()
        self.shown, self.key = reset(self._game, seed)
        self.actions: list[str] = []

    def play(self, action: str) -> Step:
        """One more answer."""
        found = step(self._game, action)
        self.shown = found.observation
        self.actions.append(action)
        return found


class Games:
    """Those that are being played, by their numbers."""

    def __init__(self, spec: str) -> None:
        self._spec = spec
        self._make = load_environment(spec)
        self._held: OrderedDict[int, _Held] = OrderedDict()

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        """How a game begins, or what comes of its last answer. Raises InputError where it fails."""
        try:
            if "actions" not in asked:
                held = _Held(self._make, asked["seed"])
                return {"observation": held.shown, "key": held.key}
            return self._stepped(**asked)._asdict()
        except InputError:
            raise
        except (Exception, SystemExit) as error:  # whatever the user's game raises
            raise InputError(
                f"game {self._spec} raised {type(error).__name__}: {error} with seed "
                f"{asked['seed']}; correct it"
            ) from error

    def _stepped(self, number: int, seed: int, actions: list[str], shown: str) -> Step:
        *before, action = actions
        held = self._held.pop(number, None)
        if held is None or held.actions != before:
            held = self._played(seed, before)
        if held.shown != shown:
            raise InputError(
                f"game {self._spec} must be the same for the same seed and answers, got "
                f"{held.shown[:80]!r} where it was {shown[:80]!r} before, with seed {seed}; draw "
                f"from random.Random(seed), and keep nothing between games"
            )
        found = held.play(action)
        if not found.done:
            self._held[number] = held
            if len(self._held) > MOST_HELD:
                self._held.popitem(last=False)
        return found

    def _played(self, seed: int, actions: Sequence[str]) -> _Held:
        held = _Held(self._make, seed)
        for action in actions:
            held.play(action)
        return held


def main() -> None:
    """Answer for games."""
    spec, seconds = sys.argv[1], float(sys.argv[2])

    def load() -> Answering:
        return Games(spec).answer

    serve(load, seconds)


if __name__ == "__main__":
    main()
