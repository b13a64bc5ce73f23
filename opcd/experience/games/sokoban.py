"""Sokoban: a box is pushed onto a target, on 6 × 6 fields of which the outer ones are walls.

A board is made backwards: from the box on the target, pulls and steps lead to every position that
can be solved, and in how few moves. One of those is drawn that takes four to ten moves, which is
two to five turns, and more than one push.
"""

import random
from collections import deque
from collections.abc import Collection

from opcd.experience.games.grid import DIRECTIONS, GridGame, Place, beside, canonical

SIDE = 6
INSIDE = [(row, column) for row in range(1, SIDE - 1) for column in range(1, SIDE - 1)]
MOST_WALLS = 3  # inside
FEWEST_MOVES, MOST_MOVES, FEWEST_PUSHES = 4, 10, 2
Position = tuple[Place, Place]  # of the player and of the box


class Sokoban(GridGame):
    """See the file's docstring."""

    rules = (
        "Push the box B onto the target T. You are P. Each # is a wall, each . is free, and + is "
        "you on the target. You push the box by walking into it, if the field behind it is free; "
        "you cannot pull it."
    )

    @property
    def key(self) -> str:
        """Walls, box and target, however they are turned or mirrored; wherever the player began."""
        return self._key

    def rows(self) -> list[str]:
        """See GridGame.rows: P or +, B, T, # and what is free."""
        return self._drawn({self._player: "+" if self._player == self._target else "P"})

    def _begin(self, seed: int) -> None:
        draw = random.Random(seed)
        found: list[Position] = []
        while not found:
            walls = set(draw.sample(INSIDE, draw.randint(0, MOST_WALLS)))
            self._free = {place for place in INSIDE if place not in walls}
            self._target = draw.choice(sorted(self._free))
            moves = solvable(self._free, self._target)
            found = sorted(
                (player, box)
                for (player, box), count in moves.items()
                if FEWEST_MOVES <= count <= MOST_MOVES
                and _apart(box, self._target) >= FEWEST_PUSHES
            )
        self._player, self._box = draw.choice(found)
        self._key = canonical(self._drawn({}))

    def _move(self, move: str) -> bool:
        to = beside(self._player, move)
        box = beside(self._box, move) if to == self._box else self._box
        if not {to, box} <= self._free:
            return False
        self._player, self._box = to, box
        return True

    def _ended(self) -> tuple[str, float] | None:
        if self._box == self._target:
            return "The box is on the target. The game is won.", 1.0
        return None

    def _drawn(self, player: dict[Place, str]) -> list[str]:
        fixed = dict.fromkeys(self._free, ".") | {self._target: "T", self._box: "B"}
        shown = fixed | player
        return ["".join(shown.get((r, c), "#") for c in range(SIDE)) for r in range(SIDE)]


def solvable(free: Collection[Place], target: Place) -> dict[Position, int]:
    """All positions from which the box comes onto the target, and in how few moves."""
    known = {(place, target): 0 for place in free if place != target}
    waiting = deque(known)
    while waiting:
        player, box = position = waiting.popleft()
        for move, (down, right) in DIRECTIONS.items():
            came_from = player[0] - down, player[1] - right
            before = [(came_from, box)]  # a step
            if beside(player, move) == box:
                before.append((came_from, player))  # a push, undone by a pull
            for it in before:
                if it[0] in free and it[0] != it[1] and it not in known:
                    known[it] = known[position] + 1
                    waiting.append(it)
    return known


def _apart(one: Place, other: Place) -> int:
    """The fewest pushes between two fields."""
    return abs(one[0] - other[0]) + abs(one[1] - other[1])
