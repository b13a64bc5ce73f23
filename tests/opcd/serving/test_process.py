"""A server that is started is gone at the end, whatever that is; of kill -9 at the next start."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.runtime import processes
from opcd.runtime.processes import are_known, family, named, place
from opcd.serving import process
from opcd.serving.process import MARK, RECORD, end_left_behind, running, servers_folder

pytestmark = pytest.mark.skipif(not are_known(), reason="needs /proc")
HOLDER = Path(__file__).parent / "holder.py"
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("FAKE_CHILDREN", "1")
    monkeypatch.setattr(processes, "GRACE_S", 0.3)


@contextlib.contextmanager
def holder(how: str) -> Iterator[subprocess.Popen]:
    """A process that holds a server; its own end is the test's."""
    held = subprocess.Popen(
        [sys.executable, str(HOLDER), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield held
    finally:
        held.kill()
        held.wait()
        assert held.stdout is not None
        held.stdout.close()
        end_left_behind()


def facts(held: subprocess.Popen) -> tuple[int, str]:
    """Port and mark of what is held, once it is up."""
    assert held.stdout is not None
    port, _, folder, key = held.stdout.readline().split()
    assert Path(folder).is_dir()
    return int(port), f"{MARK}={key}"


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def wait_for_children(mark: str) -> None:
    """The server and its three children, of which one has no mark of its own."""
    deadline = time.monotonic() + 10
    while len(family(None, mark)) < 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(family(None, mark)) == 3


@pytest.mark.parametrize(
    ("how", "ended_by", "status"),
    [
        ("returns", None, 0),
        ("raises", None, 1),
        ("waits", signal.SIGINT, 130),
        ("waits", signal.SIGTERM, 143),
    ],
)
def test_nothing_is_left(how: str, ended_by: int | None, status: int) -> None:
    with holder(how) as held:
        port, mark = facts(held)
        if ended_by is not None:
            wait_for_children(mark)
            held.send_signal(ended_by)
        assert held.wait(timeout=20) == status
        assert family(None, mark) == []
        assert not listens(port)
        assert list(servers_folder().iterdir()) == []


def test_what_kill_9_leaves_the_next_one_ends_and_nothing_else(tmp_path: Path) -> None:
    with holder("waits") as held, subprocess.Popen([sys.executable, "-c", WAIT]) as decoy:
        try:
            port, mark = facts(held)
            wait_for_children(mark)
            assert end_left_behind() == 0, "its owner lives"
            (own,) = servers_folder().iterdir()
            record = json.loads((own / RECORD).read_text())
            leader = processes.read_named(record["server"])
            everyone = family(leader, mark)
            assert len(everyone) == 4
            other = named(decoy.pid)
            assert other is not None
            # A record whose number another process has by now, and one of another machine.
            again = {**record, "server": {"pid": other.pid, "began": other.began - 1}}
            again |= {"mark": f"{MARK}={'0' * 32}", "owner": {"pid": other.pid, "began": 1}}
            write(servers_folder() / "again", again)
            elsewhere = {**again, "place": place() | {"host": "elsewhere"}}
            write(servers_folder() / "elsewhere", elsewhere)
            before = {**again, "place": place() | {"boot": "before"}}
            before |= {"server": other._asdict()}
            write(servers_folder() / "before", before)
            (servers_folder() / "broken").mkdir()
            (servers_folder() / "broken" / RECORD).write_text("{")
            (servers_folder() / "linked").symlink_to(tmp_path)
            held.kill()
            held.wait()
            assert all(one.lives for one in everyone)
            assert end_left_behind() == 4
            assert not any(one.lives for one in everyone)
            assert not listens(port)
            assert other.lives
            left = sorted(path.name for path in servers_folder().iterdir())
            assert left == ["broken", "elsewhere", "linked"]
            assert tmp_path.is_dir()
        finally:
            decoy.kill()


WAIT = "import time; time.sleep(60)"


def write(folder: Path, record: dict) -> None:
    folder.mkdir()
    (folder / RECORD).write_text(json.dumps(record))


def test_one_that_ends_by_itself_says_why() -> None:
    command = [sys.executable, "-c", "print('reading'); raise SystemExit('no room for weights')"]
    with (
        pytest.raises(InputError, match=r"(?s)ended with status 1; .*reading.*no room for weights"),
        running(lambda _: command, lambda *_: dict(os.environ)) as started,
    ):
        started.wait_until(lambda: False)
    assert list(servers_folder().iterdir()) == []


def test_one_that_never_answers_is_not_waited_for() -> None:
    with running(lambda _: [sys.executable, "-S", "-c", WAIT], lambda *_: {}) as started:
        with pytest.raises(InputError, match="must answer within 0 s, but it did not"):
            started.wait_until(lambda: False, limit_s=0.1)
        pid = started.process.pid
    assert named(pid) is None
    assert list(servers_folder().iterdir()) == []


def begin(*command: str) -> None:
    with running(lambda _: command, lambda *_: {}):
        pass


def test_where_none_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"must be one that can be run, got .*nowhere/python"):
        begin("/nowhere/python")
    assert list(servers_folder().iterdir()) == []
    monkeypatch.setattr(process, "are_known", lambda: False)
    with pytest.raises(InputError, match=r"can be started on Linux.* name its base_url"):
        begin(sys.executable)


def test_what_it_is_given() -> None:
    """A session and a folder of its own, and nothing to read."""
    code = (
        "import os, sys, pathlib; print(os.getsid(0) == os.getpid(), sys.stdin.read() == '', "
        "os.listdir(), os.environ['TMPDIR'] == str(pathlib.Path('../tmp').resolve()))"
    )
    with running(lambda _: [sys.executable, "-c", code], lambda *_: {"A": "b"}) as started:
        assert started.process.wait() == 0
        assert started.log == "True True [] True"
        assert started.folder.stat().st_mode & 0o077 == 0
        record = json.loads((started.folder / RECORD).read_text())
        assert record["owner"] == named(os.getpid())._asdict()  # type: ignore[union-attr]
        assert record["server"]["pid"] == started.process.pid
