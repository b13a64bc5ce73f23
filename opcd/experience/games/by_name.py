"""Games by their names: those that come with opcd, and a user's own."""

from collections.abc import Callable

from opcd.errors import InputError
from opcd.experience.games.environment import Environment
from opcd.experience.games.frozen_lake import FrozenLake
from opcd.experience.games.sokoban import Sokoban
from opcd.runtime.user_code import load_function

BUILT_IN: dict[str, Callable[[], Environment]] = {"frozen_lake": FrozenLake, "sokoban": Sokoban}


def load_environment(spec: str) -> Callable[[], Environment]:
    """What makes games: ``frozen_lake``, ``sokoban``, ``python:FILE.py:class`` (or a module's).

    Raises InputError for what does not exist, and for a class without reset or step.
    """
    kind, _, target = spec.partition(":")
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    if kind != "python" or not target:
        raise InputError(
            f"game must be {', '.join(BUILT_IN)} or python:FILE.py:class, got {spec!r}; choose one"
        )
    made = load_function(target, f"game {spec}", "class")
    missing = [name for name in ("reset", "step") if not callable(getattr(made, name, None))]
    if missing:
        raise InputError(
            f"game {spec} must be a class with reset(seed) and step(action), got none of "
            f"{', '.join(missing)}; define both"
        )
    return made
