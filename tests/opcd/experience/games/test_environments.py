"""Games that raise, hang, crash or lie: they cost themselves alone."""

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opcd.errors import InputError
from opcd.experience.games.by_name import load_environment
from opcd.experience.games.environment import Step, reset, step
from opcd.experience.games.environments import Environments, Opening, Running
from opcd.experience.games.exercises import drawn
from opcd.experience.settings import Experience
from opcd.runtime.workers import CRASHED, OVER_TIME, RAISED, Lost

DOCS = Path(__file__).parents[4] / "docs" / "games.md"
GAME = """
import os, random, time

class Count:
    # Says how many answers it was given; does what it is told.
    def reset(self, seed):
        if seed == 13:
            raise RuntimeError("unlucky")
        self.seed, self.given = seed, 0
        return f"Game {seed}. Say something."

    def step(self, action):
        print("a game may print")
        self.given += 1
        if action == "raise":
            raise RuntimeError("no such thing")
        if action == "sleep":
            time.sleep(1000)
        if action == "crash":
            os._exit(3)
        if action == "odd":
            return "a text alone"
        if action == "blank":
            return "", 0.0, False
        text = f"{self.seed} was given {self.given}."
        return (text + str(random.random()) if self.seed == 7 else text), 0.25, self.given == 4
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "count.py").write_text(GAME)
    return f"python:{tmp_path / 'count.py'}:Count"


def begun(environments: Environments, seeds: list[int]) -> list[Running]:
    found = []
    for seed, opening in zip(seeds, environments.openings(seeds), strict=True):
        assert isinstance(opening, Opening)
        found.append(environments.begin(seed, opening.text))
    return found


def test_a_game_that_misbehaves_costs_itself_alone(spec: str) -> None:
    with Environments(spec, seconds=0.5, workers=1) as environments:
        games = begun(environments, [*range(6)])
        first = environments.step(games, ["a"] * 6)
        assert first[0] == Step("0 was given 1.", 0.25, False)
        begin = time.monotonic()
        second = environments.step(games, ["a", "sleep", "a", "crash", "raise", "odd"])
        assert time.monotonic() - begin < 20
        # By processes that took others' places, and did not hold these games.
        assert [second[i] for i in (0, 2)] == [
            Step(f"{i} was given 2.", 0.25, False) for i in (0, 2)
        ]
        lost = [it for it in second if isinstance(it, Lost)]
        assert [it.why for it in lost] == [OVER_TIME, CRASHED, RAISED, RAISED]
        assert "seed 4 raised RuntimeError: no such thing (line 16 of count.py)" in lost[2].detail
        assert "must return (observation, reward, done)" in lost[3].detail
        going = [games[0], games[2]]
        assert environments.step(going, ["b", "b"])[1] == Step("2 was given 3.", 0.25, False)
        assert environments.step(going, ["c", "c"])[1] == Step("2 was given 4.", 0.25, True)


def test_a_game_must_go_the_same_way_again(spec: str) -> None:
    with Environments(spec, seconds=0.5, workers=1) as environments:
        games = begun(environments, [7, 8])
        environments.step(games, ["a", "a"])
        (crashed,) = environments.step(games[1:], ["crash"])
        assert isinstance(crashed, Lost)
        (lied,) = environments.step(games[:1], ["a"])
        assert isinstance(lied, Lost)
        assert "must be the same for the same seed and answers" in lied.detail
        assert "with seed 7" in lied.detail
        (blank,) = environments.step(begun(environments, [9]), ["blank"])
        assert isinstance(blank, Lost)
        assert "text for the player" in blank.detail


def test_the_time_limit_is_that_of_one_call(tmp_path: Path) -> None:
    """Also where a game is begun and played in one turn, or played again."""
    (tmp_path / "slow.py").write_text(SLOW)
    with Environments(f"python:{tmp_path / 'slow.py'}:Slow", 0.5, 1) as environments:
        games = begun(environments, [0, 1])
        assert environments.step(games, ["a", "a"])[0] == Step("a", 0.0, False)
        found = environments.step(games[::-1], ["crash", "b"])
        assert found == [Lost(CRASHED), Step("b", 0.0, False)]


SLOW = """
import os, time

class Slow:
    # Where the seed is 0.
    def reset(self, seed):
        self.seconds = 0 if seed else 0.3
        time.sleep(self.seconds)
        return f"Game {seed}."

    def step(self, action):
        time.sleep(self.seconds)
        if action == "crash":
            os._exit(3)
        return action, 0, False
"""


class Returns:
    """A game that returns what it is told to."""

    def __init__(self, text: object = "Go.", came: object = None) -> None:
        self._text, self._came = text, came

    def reset(self, seed: int) -> Any:
        return self._text

    def step(self, action: str) -> Any:
        return self._came


@pytest.mark.parametrize(
    ("came", "found"),
    [
        (None, "got None; return such a tuple"),
        (("x", 0.0, False, False, {}), "return such a tuple"),  # gymnasium's
        (("x", 0.0, False, {"TimeLimit": 1}), "got illegal {'TimeLimit': 1}; return True"),
        (("x", 0.0, "no"), "got done 'no'; return True or False"),
        (("x", 0.0, None), "got done None; return True or False"),
        (("x", float("nan"), False), "got the reward nan; return a number"),
        (("x", float("inf"), True), "got the reward inf; return a number"),
        (("x", "1", True), "got the reward '1'; return a number"),
        ((b"x", 0.0, False), "step of a game must give text for the player, got b'x'"),
        (("x" * 300_000, 0.0, False), "must give at most 262144 characters, got 300000"),
        (("\ud800", 0.0, False), "valid Unicode"),
    ],
)
def test_what_is_no_step(came: object, found: str) -> None:
    with pytest.raises(InputError, match=re.escape(found)):
        step(Returns(came=came), "a")


def test_numbers_and_flags_of_numpy() -> None:
    came = step(Returns(came=("x", np.float32(0.5), np.bool_(True), 0)), "a")
    assert came == Step("x", 0.5, True, False)
    assert [type(it) for it in came] == [str, float, bool, bool]


def test_a_key_that_fails_is_not_taken_for_none() -> None:
    class Broken(Returns):
        @property
        def key(self) -> str:
            return self.board.key  # type: ignore[attr-defined]

    class Around:
        """Whatever it lacks, its game has."""

        def __init__(self, game: object) -> None:
            self._game = game

        def __getattr__(self, name: str) -> Any:
            return getattr(self._game, name)

    class Keyed(Returns):
        key = "one of eight"

    assert reset(Around(Returns()), 1) == ("Go.", "Go.")
    assert reset(Around(Keyed()), 1) == ("Go.", "one of eight")
    with pytest.raises(AttributeError, match="board"):
        reset(Broken(), 1)
    for text in ("", " \n", None, "x" * 300_000):
        with pytest.raises(InputError, match="reset of a game must give"):
            reset(Returns(text), 1)


def test_games_are_drawn_without_those_that_do_not_begin(spec: str) -> None:
    wanted = Experience(training_games=10, validation_games=10, test_games=10)
    with Environments(spec, seconds=5, workers=1) as environments:
        parts = drawn(environments, spec, wanted)
    seeds = [game.seed for part in parts for game in part]
    assert [len(part) for part in parts] == [10, 10, 10]
    assert len({*seeds}) == 30
    assert 13 not in seeds


def test_a_game_with_too_few_boards_and_one_that_never_begins(tmp_path: Path) -> None:
    (tmp_path / "few.py").write_text(
        "class Few:\n    def reset(self, seed): return f'Game {seed % 4}'\n"
        "    def step(self, action): return 'Over', 1, True\n"
        "class Never(Few):\n    def reset(self, seed): raise KeyError('map')\n"
    )
    wanted = Experience(training_games=3, validation_games=3, test_games=3)
    few, never = (f"python:{tmp_path / 'few.py'}:{name}" for name in ("Few", "Never"))
    with Environments(few, 5, 1) as environments, pytest.raises(InputError, match="as many diff"):
        drawn(environments, few, wanted)
    with Environments(never, 5, 1) as made, pytest.raises(InputError, match=r"begin.*KeyError"):
        drawn(made, never, wanted)


def test_a_game_that_is_none_is_said_before_anything(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"frozen_lake, sokoban or python:FILE.py:class"):
        load_environment("chess")
    half = "class Half:\n    def reset(self, seed): return 'x'\none = 1\n"
    (tmp_path / "half.py").write_text(half)
    with (
        pytest.raises(InputError, match=r"reset\(seed\) and step\(action\), got none of step"),
        Environments(f"python:{tmp_path / 'half.py'}:Half", 1, 1),
    ):
        pass
    with pytest.raises(InputError, match=r"must name a class of .* has no 'Whole'; define it"):
        load_environment(f"python:{tmp_path / 'half.py'}:Whole")
    with pytest.raises(InputError, match=r"must name a class of .* in which one is 1; define it"):
        load_environment(f"python:{tmp_path / 'half.py'}:one")


def test_the_game_in_the_docs(tmp_path: Path) -> None:
    """In at most twenty lines, and it can be won."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 20
    (tmp_path / "guess.py").write_text(code)
    with Environments(f"python:{tmp_path / 'guess.py'}:Guess", 5, 1) as environments:
        low, high = 1, 50
        (game,) = begun(environments, [3])
        for _ in range(6):
            guess = (low + high) // 2
            (came,) = environments.step([game], [f"I say {guess}"])
            assert isinstance(came, Step)
            if came.done:
                break
            low, high = (guess + 1, high) if "more" in came.observation else (low, guess - 1)
        assert came.reward == 1
        (odd,) = environments.step(begun(environments, [4]), ["no idea"])
        assert isinstance(odd, Step)
        assert odd.illegal
