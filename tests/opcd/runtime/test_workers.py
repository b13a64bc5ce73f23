"""Processes that answer: what a user's code starts or reads there, and one that never is ready."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.runtime import workers
from opcd.runtime.workers import OVER_TIME, RAISED, Lost, Workers

MODULE = """
import os, subprocess, sys, time
from opcd.errors import InputError
from opcd.runtime.workers import serve

def answer(asked):
    what = asked["what"]
    if what == "fork" and os.fork() == 0:
        time.sleep(60)  # with all that its parent has open
        os._exit(0)
    if what == "fork and come back" and os.fork():
        time.sleep(0.2)
        return {"said": "its parent"}
    if what == "fork and leave" and os.fork() == 0:
        os.setsid()
        time.sleep(20)
        os._exit(0)
    if what == "start":
        subprocess.Popen(["cat"], stdout=subprocess.DEVNULL)
    if what == "hang":
        time.sleep(60)
    if what == "ask":
        try:
            input("a number, please: ")
        except EOFError as error:
            raise InputError("nobody is there") from error
    return {"said": what}

def load():
    if sys.argv[1] == "dies":
        os._exit(3)
    if sys.argv[1] == "hangs":
        time.sleep(60)
    return answer

serve(load, float(sys.argv[2]))
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Workers]:
    (tmp_path / "module_of_test.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return lambda how="well", seconds=5.0: Workers("module_of_test", [how], seconds, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_processes_that_it_starts_end_with_it_and_hold_nothing_up(
    made: Callable[..., Workers],
) -> None:
    begin = time.monotonic()
    with made(seconds=0.5) as asked:
        forked, hung, after = asked.ask([{"what": what} for what in ("fork", "hang", "fork")])
    assert forked == after == {"said": "fork"}
    assert hung == Lost(OVER_TIME)
    assert time.monotonic() - begin < 20


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_it_forks_answers_nothing(made: Callable[..., Workers]) -> None:
    """Nor is anybody kept waiting for one that has left its group."""
    begin = time.monotonic()
    with made() as asked:
        texts = ["fork and come back", "well", "fork and leave", "fork and come back", "well"]
        found = asked.ask([{"what": what} for what in texts])
    said = [it["said"] for it in found if not isinstance(it, Lost)]
    assert said == ["its parent", "well", "fork and leave", "its parent", "well"]
    assert time.monotonic() - begin < 15


def test_questions_are_read_by_nothing_else(made: Callable[..., Workers]) -> None:
    with made() as asked:
        found = asked.ask([{"what": what} for what in ("start", "ask", "well")])
    assert found == [{"said": "start"}, Lost(RAISED, "nobody is there"), {"said": "well"}]
    assert str(found[1]) == "raised: nobody is there"


def test_one_that_never_is_ready(
    made: Callable[..., Workers], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"dies must be loaded within 120 .*lost \(crashed\)"):
        made("dies").__enter__()
    monkeypatch.setattr(workers, "START_SECONDS", 0.5)
    with pytest.raises(InputError, match=r"hangs must be loaded .*lost \(over the time limit\)"):
        made("hangs").__enter__()


def test_as_many_as_there_are_cores_to_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert workers.usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")
    assert workers.usable_cores() == os.cpu_count()
