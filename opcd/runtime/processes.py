"""Which process is which, on Linux, and how one that was started here ends with its children.

A number alone does not name a process: it is given again. A number with the time at which the
process began does, until the machine is started again; and so does a mark in its environment, which
children inherit, whatever group or session they put themselves in.
"""

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

PROC = Path("/proc")
GRACE_S, KILL_S = 15.0, 5.0  # until SIGTERM has done its work, and SIGKILL
OFTEN_S = 0.05
GONE = ("Z", "X")  # ended; its number is kept until its parent has looked


class Named(NamedTuple):
    """A process that no other one is mistaken for, within one start of a machine."""

    pid: int
    began: int  # clock ticks from the machine's start to the process's

    @property
    def lives(self) -> bool:
        """Whether it still runs."""
        found = _status(self.pid)
        return found is not None and found.began == self.began and found.state not in GONE


class _Status(NamedTuple):
    state: str
    group: int
    began: int


def are_known() -> bool:
    """Whether this system tells about its processes, as Linux does."""
    return (PROC / "self" / "stat").is_file()


def named(pid: int) -> Named | None:
    """The process of that number; None where there is none."""
    found = _status(pid)
    return None if found is None else Named(pid, found.began)


def place() -> dict[str, str]:
    """Where numbers of processes mean what they mean here: machine, its start, and namespace."""
    boot = PROC / "sys" / "kernel" / "random" / "boot_id"
    return {
        "host": platform.node(),
        "boot": boot.read_text("ascii").strip() if boot.is_file() else "",
        "namespace": os.readlink(PROC / "self" / "ns" / "pid"),
    }


def family(leader: Named | None, mark: str) -> list[Named]:
    """Who still runs of a process and its children.

    Those whose environment holds `mark`, as ``NAME=value``; and while the leader's number is its
    own, those in its group. Never who asks, nor who is in its group: a child that was given a
    session of its own cannot get there, so that a file that says so is wrong.
    """
    own = os.getpgrp()
    found = {
        number: status
        for number in _numbers()
        if number > 1 and (status := _status(number)) is not None and status.group != own
    }
    at = found.get(leader.pid) if leader is not None else None
    verified = leader is not None and at is not None and at.began == leader.began
    group = leader.pid if verified and leader is not None else None  # else the number is another's
    return [
        Named(number, status.began)
        for number, status in found.items()
        if status.state not in GONE and (status.group == group or _has_mark(number, mark))
    ]


def end_family(leader: Named | None, mark: str) -> int:
    """End them: asked first, then killed. Returns how many there were.

    Where that is interrupted, they are killed at once.
    """
    there = family(leader, mark)

    def left() -> list[Named]:
        # A group is nobody's where its leader is gone, so that who was in it is kept in mind.
        return list({*family(leader, mark), *(process for process in there if process.lives)})

    try:
        _send(there, signal.SIGTERM)
        _wait(left, GRACE_S)
    finally:
        if others := left():
            _send(others, signal.SIGKILL)
            _wait(left, KILL_S)
    return len(there)


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Kill a process that leads a session of its own, and its children, which may hold its pipes
    open; on systems without groups the process alone."""
    if process.returncode is None and hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS: where all ended
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()


def _send(processes: list[Named], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if process.lives:
                os.kill(process.pid, number)


def _wait(left: Callable[[], list[Named]], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while left() and time.monotonic() < deadline:
        time.sleep(OFTEN_S)


def _numbers() -> list[int]:
    return [int(entry) for entry in os.listdir(PROC) if entry.isdigit()]


def _status(pid: int) -> _Status | None:
    """Of /proc/PID/stat, whose second field is a name that may hold anything; None without it."""
    try:
        text = (PROC / str(pid) / "stat").read_text("utf-8", "replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()  # from the third on
    return _Status(fields[0], int(fields[2]), int(fields[19]))


def _has_mark(pid: int, mark: str) -> bool:
    """Whether an environment holds it; those of other users are not told."""
    try:
        environment = (PROC / str(pid) / "environ").read_bytes()
    except OSError:
        return False
    return mark.encode() in environment.split(b"\0")


def read_named(value: Any) -> Named | None:
    """What a file says of a process, as `Named._asdict`; None for anything else."""
    if not isinstance(value, Mapping):
        return None
    pid, began = value.get("pid"), value.get("began")
    whole = type(pid) is int and type(began) is int and pid > 1
    return Named(pid, began) if whole else None  # type: ignore[arg-type]
