"""What games on boards of letters have in common: turns, and when two boards are the same."""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

from opcd.experience.games.environment import Step

Place = tuple[int, int]  # row and column, from the top left
DIRECTIONS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
MOVES_A_TURN = 2  # a board that takes ten moves is played in five turns
QUESTION = (
    "Which way do you go? Answer with two of these words, separated by a comma: up, down, left, "
    "right."
)
_NAMED = re.compile(rf"\b({'|'.join(DIRECTIONS)})\b", re.IGNORECASE)


def moves_in(text: str) -> list[str]:
    """The first moves of the last line that names any: a text may think before it answers."""
    lines = [_NAMED.findall(line) for line in text.splitlines()]
    named: list[str] = next((found for found in reversed(lines) if found), [])
    return [move.lower() for move in named[:MOVES_A_TURN]]


def beside(place: Place, move: str) -> Place:
    """Where a move leads, also where that is off the board."""
    down, right = DIRECTIONS[move]
    return place[0] + down, place[1] + right


def symmetries(rows: Sequence[str]) -> Iterator[list[str]]:
    """The eight ways to turn and mirror a square board, itself among them."""
    board = list(rows)
    for _ in range(4):
        board = ["".join(column) for column in zip(*board[::-1], strict=True)]  # a quarter turn
        yield board
        yield board[::-1]


def canonical(rows: Sequence[str]) -> str:
    """One text for a board however it is turned or mirrored."""
    return min("\n".join(board) for board in symmetries(rows))


class GridGame(ABC):
    """A player on a board who walks one or two moves a turn.

    A move that cannot be made, or an answer without one, leaves the player in place, and counts as
    illegal.
    """

    rules: str

    @property
    @abstractmethod
    def key(self) -> str:
        """See Environment."""

    def reset(self, seed: int) -> str:
        """See Environment.reset."""
        self._begin(seed)
        return f"{self.rules}\n\n{self._shown()}\n\n{QUESTION}"

    def step(self, action: str) -> Step:
        """See Environment.step."""
        moves = moves_in(action)
        remarks = [] if moves else ["You named no move."]
        for move in moves:
            if not self._move(move):
                remarks.append(f"You cannot go {move} from there.")
                break
            if ended := self._ended():
                text, reward = ended
                return Step(text, reward, True)
        text = "\n\n".join([*remarks, self._shown(), QUESTION])
        return Step(text, 0.0, False, bool(remarks))

    @abstractmethod
    def rows(self) -> list[str]:
        """How the board stands, a letter a field."""

    @abstractmethod
    def _begin(self, seed: int) -> None:
        """Set the board of a seed up."""

    @abstractmethod
    def _move(self, move: str) -> bool:
        """Make a move; False where it cannot be made."""

    @abstractmethod
    def _ended(self) -> tuple[str, float] | None:
        """The last word and the reward, where the game is over."""

    def _shown(self) -> str:
        return "\n".join(" ".join(row) for row in self.rows())
