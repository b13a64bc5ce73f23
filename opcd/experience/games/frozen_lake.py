"""Frozen Lake: from a corner of a board of ice to the one across, around the holes.

4 × 4 fields with two to four holes. A start and a goal in two corners and a way between them leave
1,180 boards; 322 of them differ by more than being turned, mirrored or walked backwards. Nobody
slips.
"""

import random
from collections import deque
from collections.abc import Collection

from opcd.experience.games.grid import DIRECTIONS, GridGame, Place, beside, canonical

SIDE = 4
START, GOAL = (0, 0), (SIDE - 1, SIDE - 1)
FIELDS = [(row, column) for row in range(SIDE) for column in range(SIDE)]
FEWEST_HOLES, MOST_HOLES = 2, 4


class FrozenLake(GridGame):
    """See the file's docstring."""

    rules = (
        "Find a way over the frozen lake. You are P and want to reach G. Each . is safe ice, each "
        "H is a hole: whoever steps on one loses."
    )

    @property
    def key(self) -> str:
        """The board, however it is turned or mirrored, and whichever corner is the start."""
        ends = {START: "S", GOAL: "S"}
        return canonical(self._drawn(ends))

    def rows(self) -> list[str]:
        """See GridGame.rows: P, G, H and ice."""
        return self._drawn({GOAL: "G", self._player: "P"})

    def _begin(self, seed: int) -> None:
        draw = random.Random(seed)
        between = [field for field in FIELDS if field not in (START, GOAL)]
        self._holes: set[Place] = set(between)
        while not reachable(self._holes):
            count = draw.randint(FEWEST_HOLES, MOST_HOLES)
            self._holes = set(draw.sample(between, count))
        self._player = START

    def _move(self, move: str) -> bool:
        to = beside(self._player, move)
        if to not in FIELDS:
            return False
        self._player = to
        return True

    def _ended(self) -> tuple[str, float] | None:
        if self._player in self._holes:
            return "You fell into a hole. The game is lost.", 0.0
        if self._player == GOAL:
            return "You reached G. The game is won.", 1.0
        return None

    def _drawn(self, letters: dict[Place, str]) -> list[str]:
        shown = dict.fromkeys(self._holes, "H") | letters
        return ["".join(shown.get((r, c), ".") for c in range(SIDE)) for r in range(SIDE)]


def reachable(holes: Collection[Place]) -> bool:
    """Whether a way leads from the start to the goal."""
    seen, waiting = {START}, deque([START])
    while waiting:
        here = waiting.popleft()
        for move in DIRECTIONS:
            to = beside(here, move)
            if to in FIELDS and to not in holes and to not in seen:
                seen.add(to)
                waiting.append(to)
    return GOAL in seen
