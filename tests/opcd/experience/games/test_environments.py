"""Games that raise, hang, crash or lie: they cost themselves alone."""

import re
import time
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.experience.games.environment import Step, load_environment
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
        assert "RuntimeError: no such thing with seed 4" in lost[2].detail
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
        (blank,) = environments.step(begun(environments, [9]), ["blank"])
        assert isinstance(blank, Lost)
        assert "text for the player" in blank.detail


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
    (tmp_path / "half.py").write_text("class Half:\n    def reset(self, seed): return 'x'\n1 / 1\n")
    with (
        pytest.raises(InputError, match=r"reset\(seed\) and step\(action\), got none of step"),
        Environments(f"python:{tmp_path / 'half.py'}:Half", 1, 1),
    ):
        pass
    with pytest.raises(InputError, match="must name a class of"):
        load_environment(f"python:{tmp_path / 'half.py'}:Whole")


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
