"""Players behind the protocol of engines: text in, text out, as token ids of the tiny tokenizer."""

import itertools
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from opcd.episodes import Prompt
from opcd.experience.games.environment import Environment
from opcd.experience.games.environments import Environments
from opcd.experience.games.playing import Game, Seat
from opcd.rollouts.protocol import Rollout, SamplingParams
from opcd.runtime.workers import Lost
from opcd.tasks.chat import Chat
from opcd.tasks.messages import system, user
from opcd.tasks.template import Template
from tests.conftest import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
END = 1
PARAMS = SamplingParams(40)
STEPS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
Board = list[list[str]]


class Player:
    """An engine whose rows are answered by a function of the last board, and of a stream."""

    name = "player"

    def __init__(self, answer: Callable[[Board, int], str]) -> None:
        self._answer = answer

    def open(self, prompts: Sequence[Sequence[int]]) -> "_Rows":
        return _Rows(prompts, self._answer)

    def generate(self, *_: Any) -> list[Rollout]:
        raise AssertionError("games are played over open rows")

    def sync(self, *_: Any) -> None: ...

    def close(self) -> None: ...


class _Rows:
    def __init__(
        self, prompts: Sequence[Sequence[int]], answer: Callable[[Board, int], str]
    ) -> None:
        self.token_ids = [list(prompt) for prompt in prompts]
        self._open = [True] * len(prompts)
        self._answer = answer

    def complete(
        self, params: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[Rollout | None]:
        found: list[Rollout | None] = []
        assert streams is not None
        for ids, is_open, stream in zip(self.token_ids, self._open, streams, strict=True):
            if not is_open:
                found.append(None)
                continue
            text = TOKENIZER.decode(ids)
            assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
            said = [*TOKENIZER.encode(self._answer(last_board(text), stream)), END]
            found.append(Rollout(list(ids), said, "stop", 0))
            ids += said
        return found

    def append(self, token_ids: Sequence[Sequence[int]]) -> None:
        for row, new in enumerate(token_ids):
            assert self._open[row] or not new
            self.token_ids[row] += new
            self._open[row] = bool(new)

    def close(self) -> None: ...


def last_board(text: str) -> Board:
    """The newest lines of single letters."""
    lines = text.splitlines()
    rows = [line.split(" ") if all(len(x) == 1 for x in line.split(" ")) else [] for line in lines]
    end = max(i for i, row in enumerate(rows) if len(row) > 2) + 1
    begin = max((i for i in range(end) if not rows[i]), default=-1) + 1
    return rows[begin:end]


def solved(board: Board) -> list[str]:
    """The fewest moves that win, found by trying: of either game."""
    where = {x: (r, c) for r, row in enumerate(board) for c, x in enumerate(row)}
    player = where.get("P") or where["+"]
    start = (player, where.get("B"))
    goal = where.get("G") or where.get("T") or where["+"]
    waiting, seen = deque([(start, list[str]())]), {start}
    while waiting:
        (at, box), moves = waiting.popleft()
        if (at if box is None else box) == goal:
            return moves
        for move, (down, right) in STEPS.items():
            to = at[0] + down, at[1] + right
            pushed = (to[0] + down, to[1] + right) if to == box else box
            places = [place for place in (to, pushed) if place is not None]
            inside = all(0 <= r < len(board) and 0 <= c < len(board) for r, c in places)
            if not inside or any(board[r][c] in "#H" for r, c in places):
                continue
            if (to, pushed) not in seen:
                seen.add((to, pushed))
                waiting.append(((to, pushed), [*moves, move]))
    raise AssertionError(f"a board without a solution: {board}")


def oracle(board: Board, stream: int) -> str:
    """The next two moves of a shortest way."""
    return ", ".join(solved(board)[:2])


def drawing(chances: Mapping[tuple[str, ...], float]) -> Callable[[Board, int], str]:
    """A player who draws the moves of a turn, whatever the board is."""
    replies, weights = [*chances], [*chances.values()]
    return lambda _, stream: ", ".join(random.Random(stream).choices(replies, weights)[0]) or "Hm."


def expected(board: Board, chances: Mapping[tuple[str, ...], float], turns: int) -> list[float]:
    """Of such a player on a frozen lake: the chance to win, and the mean of illegal turns, turn by
    turn over where it may be."""
    size = len(board)
    at: dict[tuple[int, int], float] = {(0, 0): 1.0}
    won = illegal = 0.0
    for _ in range(turns):
        after: dict[tuple[int, int], float] = {}
        for (place, chance), (moves, share) in itertools.product(at.items(), chances.items()):
            here, p, over = place, chance * share, False
            illegal += 0 if moves else p
            for move in moves:
                to = here[0] + STEPS[move][0], here[1] + STEPS[move][1]
                if not (0 <= to[0] < size and 0 <= to[1] < size):
                    illegal += p
                    break
                here = to
                if over := board[to[0]][to[1]] in "GH":
                    won += p if board[to[0]][to[1]] == "G" else 0
                    break
            if not over:
                after[here] = after.get(here, 0) + p
        at = after
    return [won, illegal]


def chat_of(context: str = "Walk well.", template: str | None = None) -> Chat:
    tokenizer = tiny_tokenizer(template) if template else TOKENIZER
    return Chat(Template(tokenizer), [system(context)])


def seats(
    environments: Environments, seeds: Sequence[int], chat: Chat, prompted: bool = False
) -> list[Seat]:
    """A seat at the game of each seed."""
    found = []
    for seed, opening in zip(seeds, environments.openings(seeds), strict=True):
        assert not isinstance(opening, Lost), opening
        game = Game((user(opening.text),), (), f"seed {seed}", seed=seed)
        alone, behind = chat.student_ids(game.messages), chat.teacher_ids(game.messages)
        prompt = Prompt(alone, behind)
        start = behind if prompted else alone
        found.append(Seat(game, prompt, start, seed, max(len(alone), len(behind))))
    return found


def board_of(game: Environment, seed: int) -> Board:
    return last_board(game.reset(seed))
