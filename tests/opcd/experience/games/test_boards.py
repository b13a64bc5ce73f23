"""Boards: how many there are, which are the same, what moves do, and that each can be won."""

import itertools
import random

import pytest

from opcd.experience.games.environment import Environment, Step
from opcd.experience.games.frozen_lake import FIELDS, GOAL, START, FrozenLake, reachable
from opcd.experience.games.grid import canonical, moves_in, symmetries
from opcd.experience.games.sokoban import Sokoban
from tests.opcd.experience.games.players import board_of, last_board, oracle, solved

GAMES = [FrozenLake, Sokoban]


def test_a_board_has_eight_forms_and_one_key() -> None:
    forms = [*symmetries(["PH.", "...", ".HG"])]
    assert len({tuple(form) for form in forms}) == 8
    assert len({canonical(form) for form in forms}) == 1
    assert len({tuple(form) for form in symmetries(["#.#", ".#.", "#.#"])}) == 1


def test_frozen_lake_has_so_many_boards() -> None:
    between = [field for field in FIELDS if field not in (START, GOAL)]
    boards = [
        set(holes)
        for count in (2, 3, 4)
        for holes in itertools.combinations(between, count)
        if reachable(holes)
    ]
    assert len(boards) == 1180
    game, keys = FrozenLake(), set()
    for holes in boards:
        game._holes, game._player = holes, START
        keys.add(game.key)
        rows = game.rows()
        assert len(solved([[*row] for row in rows])) == 6
        mirrored = ["".join(row) for row in zip(*rows, strict=True)]
        assert game.key == canonical([row.replace("P", "S").replace("G", "S") for row in mirrored])
    assert len(keys) == 322


@pytest.mark.parametrize("made", GAMES)
def test_every_seed_is_a_board_that_five_turns_win(made: type[FrozenLake] | type[Sokoban]) -> None:
    game, state = made(), random.getstate()
    for seed in range(150):
        opening = game.reset(seed)
        key, board = game.key, board_of(game, seed)
        assert made().reset(seed) == opening
        assert game.key == key
        moves = solved(board)
        assert 3 < len(moves) <= 10
        came = play_all(game, seed)
        assert came.reward == 1
        assert came.done
    assert random.getstate() == state


def play_all(game: Environment, seed: int) -> Step:
    """By the oracle, from the texts alone."""
    text = game.reset(seed)
    for _ in range(5):
        came = game.step(oracle(last_board(text), 0))
        assert not came.illegal
        if came.done:
            return came
        text = came.observation
    raise AssertionError("not won in five turns")


def test_a_box_is_pushed_more_than_once() -> None:
    game = Sokoban()
    for seed in range(150):
        board = board_of(game, seed)
        where = {x: (r, c) for r, row in enumerate(board) for c, x in enumerate(row)}
        (r, c), target = where["B"], where.get("T") or where["+"]
        assert abs(r - target[0]) + abs(c - target[1]) >= 2
        assert [row[0] + row[-1] for row in board] == ["##"] * 6
        assert {*board[0], *board[-1]} == {"#"}


def test_what_counts_as_a_move() -> None:
    assert moves_in("right, down") == ["right", "down"]
    assert moves_in("Upright? RIGHT\nI go Down and left and up.") == ["down", "left"]
    assert moves_in("[up]\nThat is it.") == ["up"]
    assert moves_in("downwards, H, 3") == []


def test_walking_on_ice() -> None:
    game = FrozenLake()
    game._holes, game._player = {(0, 2), (1, 1)}, START
    came = game.step("up, right")
    assert came.illegal
    assert came.observation.startswith("You cannot go up from there.\n\nP . H .\n")
    assert game.step("nowhere").observation.startswith("You named no move.")
    came = game.step("down, down, right")
    assert came[1:] == (0.0, False, False)
    assert came.observation.startswith(". . H .\n. H . .\nP . . .\n. . . G")
    assert game.step("right, up") == Step("You fell into a hole. The game is lost.", 0.0, True)
    game._player = (3, 2)
    assert game.step("right, right") == Step("You reached G. The game is won.", 1.0, True)


def test_pushing_a_box() -> None:
    game = Sokoban()
    game._free = {(r, c) for r in range(1, 5) for c in range(1, 5)} - {(1, 1)}
    game._player, game._box, game._target = (2, 1), (2, 2), (3, 4)
    assert game.step("up").illegal  # a wall
    assert not game.step("right, right").illegal
    assert game.rows()[2] == "#..PB#"
    assert game.step("right").illegal  # a wall behind the box
    came = game.step("up, right")
    assert not came.done
    assert game.step("down") == Step("The box is on the target. The game is won.", 1.0, True)
    game._player, game._box = game._target, (2, 2)
    assert game.rows()[3] == "#...+#"
