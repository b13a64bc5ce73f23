"""What a game is: begun with a seed, told as text, answered with text, and over at some point.

    game = FrozenLake()
    print(game.reset(seed=7))
    observation, reward, done, illegal = game.step("right, down")

The same seed and the same answers must give the same game, on every machine: a game whose process
was lost by another one's fault is played again up to where it stood.
"""

import math
from numbers import Real
from typing import Any, NamedTuple, Protocol

from opcd.errors import InputError
from opcd.tasks.messages import check_unicode

WON = 1.0 - 1e-6  # what a game's rewards add up to, but for rounding; anything less is not won
MOST_CHARACTERS = 1 << 18  # of a text: more than models read, and soon made into tokens


class Step(NamedTuple):
    """What came of an answer. A user's own may be a plain tuple, with or without `illegal`."""

    observation: str  # what the player is told; may be "" where the game is over
    reward: float  # a game is won where they add up to 1
    done: bool  # whether the game is over
    illegal: bool = False  # whether the answer was, at least in part, no move of the game


class Environment(Protocol):
    """One game at a time.

    It may also have a `key`, text that is the same for games which are one in different dress, such
    as a board and its mirror image: they stay in one part. Without it that is the first text.
    """

    def reset(self, seed: int) -> str:
        """Begin the game that belongs to a seed; returns the rules, and how it stands."""
        ...

    def step(self, action: str) -> Step:
        """What comes of the player's answer, of which any thought is left out."""
        ...


def reset(game: Environment, seed: int) -> tuple[str, str]:
    """The first text of a game, and its key. Raises InputError for what is no text."""
    text = _text(game.reset(seed), "reset", blank=False)
    try:
        key = getattr(game, "key")  # noqa: B009  # which not every game has
    except AttributeError as error:
        if hasattr(type(game), "key") or error.name != "key":  # it is there, and fails
            raise
        key = text
    return text, _text(key, "key", blank=False)


def step(game: Environment, action: str) -> Step:
    """What comes of an answer. Raises InputError for what is no step."""
    returned: Any = game.step(action)
    wants = "a game's step must return (observation, reward, done), or (..., illegal)"
    if not isinstance(returned, tuple) or len(returned) not in (3, 4):
        raise InputError(f"{wants}, got {returned!r:.100}; return such a tuple")
    found = Step(*returned)
    if not isinstance(found.reward, Real) or not math.isfinite(found.reward):
        raise InputError(f"{wants}, got the reward {found.reward!r:.40}; return a number")
    for name in ("done", "illegal"):
        if getattr(found, name) not in (True, False):
            raise InputError(
                f"{wants}, got {name} {getattr(found, name)!r:.40}; return True or False"
            )
    text = _text(found.observation, "step", blank=bool(found.done))
    return Step(text, float(found.reward), bool(found.done), bool(found.illegal))


def _text(value: Any, what: str, blank: bool) -> str:
    if not isinstance(value, str) or not (blank or value.strip()):
        raise InputError(
            f"{what} of a game must give text for the player, got {value!r:.80}; return a string "
            f"that is not blank"
        )
    if len(value) > MOST_CHARACTERS:
        raise InputError(
            f"{what} of a game must give at most {MOST_CHARACTERS} characters, got {len(value)}; "
            f"leave out what a player need not read"
        )
    check_unicode(value, f"{what} of a game")
    return value
