"""Checkers that raise, hang, crash or print: the others' answers stay, and theirs are counted."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.experience.checking import Asked, Checkers
from opcd.runtime.workers import CRASHED, OVER_TIME, RAISED, Lost, dropped
from opcd.scoring.scorers import load_scorer

CHECKER = """
import os, re, time

def check(completion, answers):
    print("a checker may print")
    if completion == "raise":
        raise RuntimeError("no such thing")
    if completion == "sleep":
        time.sleep(1000)
    if completion == "hold":  # the interpreter, within one call into C
        re.match(r"(a+)+$", "a" * 60 + "b")
    if completion == "crash":
        os._exit(3)
    if completion == "odd":
        return "yes"
    return completion in answers
"""


def asked(text: str, *answers: str) -> Asked:
    return Asked(text, answers, text, [{"role": "user", "content": "?"}])


@pytest.fixture
def checker(tmp_path: Path) -> str:
    (tmp_path / "checker.py").write_text(CHECKER)
    return f"python:{tmp_path / 'checker.py'}:check"


def test_a_checker_that_misbehaves_costs_its_own_attempts_alone(checker: str) -> None:
    texts = ["a", "sleep", "b", "raise", "hold", "a", "crash", "odd", "a"]
    with Checkers(checker, seconds=0.5, workers=2) as checkers:
        begin = time.monotonic()
        found = checkers.check([asked(text, "a") for text in texts])
        assert time.monotonic() - begin < 30
        again = checkers.check([asked("a", "a"), asked("b", "a"), asked("a", "a")])
    lost = [it for it in found if isinstance(it, Lost)]
    values = [None if isinstance(it, Lost) else it for it in found]
    assert values == [1.0, None, 0.0, None, None, 1.0, None, None, 1.0]
    assert dropped(lost) == {OVER_TIME: 2, RAISED: 2, CRASHED: 1}
    assert "no such thing" in lost[1].detail
    assert again == [1.0, 0.0, 1.0]  # by processes that took others' places


def test_a_worker_whose_parent_is_gone_ends_by_itself(checker: str) -> None:
    """Even where a checker holds the interpreter."""
    command = [sys.executable, "-m", "opcd.experience.check_worker", checker, "0.1"]
    worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdin is not None
    worker.stdin.write(json.dumps(asked("hold", "a")._asdict()) + "\n")
    worker.stdin.flush()
    assert worker.wait(timeout=30) != 0


def test_a_built_in_checker() -> None:
    with Checkers("number", seconds=5, workers=1) as checkers:
        found = checkers.check([asked("so it is 1,200", "1200"), asked("12", "1200")])
    assert found == [1.0, 0.0]


def test_a_checker_that_is_none_is_said_before_anything(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with (
        pytest.raises(InputError, match="ZeroDivisionError"),
        Checkers(f"python:{tmp_path / 'broken.py'}:check", seconds=1, workers=1),
    ):
        pass
    with pytest.raises(InputError, match="choose one"), Checkers("vague", 1, workers=1):
        pass


def test_mathematics_is_compared_where_its_package_is() -> None:
    try:
        import math_verify  # noqa: F401
    except ImportError:
        with pytest.raises(InputError, match="pip install math-verify"):
            load_scorer("math")
        return
    scorer = load_scorer("math")
    assert scorer("the half, $\\frac{2}{4}$", ["$\\frac{1}{2}$"]).value == 1
    assert scorer("$\\frac{1}{3}$", ["$\\frac{1}{2}$"]).value == 0
