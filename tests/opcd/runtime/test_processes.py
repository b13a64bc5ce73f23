"""Processes by their beginnings and by a mark, and how they end with their children."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opcd.runtime import processes
from opcd.runtime.processes import Named, are_known, end_family, family, named, place, read_named

pytestmark = pytest.mark.skipif(not are_known(), reason="needs /proc")
MARK = "OPCD_TEST_MARK"
SLEEP = "import time; print(flush=True); time.sleep(60)"
DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen]]:
    these: list[subprocess.Popen] = []
    yield these
    for process in these:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def start(
    these: list[subprocess.Popen], code: str = SLEEP, mark: str = "", **options: object
) -> Named:
    """A process that has begun its work."""
    environment = {**os.environ, **({MARK: mark} if mark else {})}
    process = subprocess.Popen(
        [sys.executable, "-S", "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        **options,  # type: ignore[call-overload]
    )
    these.append(process)
    assert process.stdout is not None
    process.stdout.readline()
    found = named(process.pid)
    assert found is not None
    return found


def test_a_number_that_is_given_again_names_nobody(started: list) -> None:
    one = start(started, start_new_session=True)
    assert one.lives
    assert family(one, "no=mark") == [one]
    before = one._replace(began=one.began - 1)  # who had the number before
    assert not before.lives
    assert family(before, "no=mark") == []
    assert end_family(before, "no=mark") == 0
    assert one.lives
    started[0].kill()
    started[0].wait()
    assert not one.lives
    assert named(one.pid) != one


def test_without_a_leader_no_group_is_anybodys() -> None:
    """Kernel threads, and in a container others, are in group 0."""
    assert family(None, "no=mark") == []
    assert family(Named(2**22 + 1, 1), "no=mark") == []


def test_who_asks_is_never_found_nor_its_group(started: list) -> None:
    """Whatever a file says: it would end the caller, or the shell that called it."""
    start(started, mark="16")
    asks, shell = named(os.getpid()), named(os.getpgrp())
    for leader in (asks, shell):
        assert leader is not None
        assert family(leader, f"{MARK}=16") == []
        assert end_family(leader, f"{MARK}=16") == 0
    assert started[0].poll() is None


def test_children_are_found_by_their_mark_and_by_their_group(started: list) -> None:
    # `process_group` came with Python 3.11, `preexec_fn` was there before.
    leader = start(started, mark="17", preexec_fn=os.setpgrp)
    apart = start(started, mark="17", start_new_session=True)
    start(started, mark="171", start_new_session=True)  # of another server
    grouped = start(started, preexec_fn=lambda: os.setpgid(0, leader.pid))
    assert set(family(leader, f"{MARK}=17")) == {leader, apart, grouped}
    assert set(family(None, f"{MARK}=17")) == {leader, apart}


def test_they_are_asked_and_then_killed(
    started: list, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "GRACE_S", 0.2)
    leader = start(started, mark="18", start_new_session=True)
    deaf = start(started, DEAF, mark="18", start_new_session=True)
    assert end_family(leader, f"{MARK}=18") == 2
    assert [p.wait() for p in started] == [-signal.SIGTERM, -signal.SIGKILL]
    assert not leader.lives
    assert not deaf.lives


def test_where_that_is_interrupted_they_are_killed_at_once(
    started: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    deaf = start(started, DEAF, mark="19", start_new_session=True)
    began = time.monotonic()
    waited = processes._wait

    def interrupted(*given: object) -> None:
        monkeypatch.setattr(processes, "_wait", waited)
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        end_family(deaf, f"{MARK}=19")
    assert started[0].wait() == -signal.SIGKILL
    assert time.monotonic() - began < processes.GRACE_S / 2


def test_what_a_file_says_of_a_process() -> None:
    own = named(os.getpid())
    assert own is not None
    assert read_named(own._asdict()) == own
    for wrong in (None, [], {}, {"pid": 1, "began": 0}, {"pid": "9", "began": 1}, {"pid": True}):
        assert read_named(wrong) is None
    assert place() == place()
    assert place()["boot"]
