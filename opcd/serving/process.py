"""The life of a server that is started here: its folder, its record, its end.

A folder of its own in the user's cache holds everything that it writes, and a record of who it is.
It ends with its children, and the folder with it, however the caller goes on. Only SIGKILL leaves
something behind: what the record names, which the next one that starts a server ends.
"""

import contextlib
import os
import re
import secrets
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from opcd.errors import InputError
from opcd.runtime.cache import cache_dir
from opcd.runtime.files import make_folder, write_json
from opcd.runtime.processes import (
    Named,
    are_known,
    end_family,
    family,
    named,
    place,
    read_named,
)
from opcd.runtime.strict_json import parse_json

HOST = "127.0.0.1"  # nobody of another machine reaches it
MARK = "OPCD_SERVER"  # in the environment of a server and its children
RECORD, LOG = "record.json", "server.log"
START_S = 600.0  # until it answers: a large model is read, and a GPU's kernels are compiled
OFTEN_S = 0.2
LAST_LINES, LAST_CHARACTERS = 15, 3000  # of a log, in an error


class Started(NamedTuple):
    """A server that runs."""

    folder: Path
    key: str  # nobody else of this machine may ask it anything
    process: "subprocess.Popen[bytes]"

    @property
    def log(self) -> str:
        """The last lines of what it said."""
        try:
            text = (self.folder / LOG).read_text("utf-8", "replace")
        except OSError:
            return ""
        return "\n".join(text.splitlines()[-LAST_LINES:])[-LAST_CHARACTERS:]

    def wait_until(self, ready: Callable[[], bool], limit_s: float = START_S) -> None:
        """Wait for it to be ready. Raises InputError, with its last lines, where it never is."""
        deadline = time.monotonic() + limit_s
        while not ready():
            status = self.process.poll()
            if status is not None or time.monotonic() > deadline:
                how = f"it ended with status {status}" if status is not None else "it did not"
                raise InputError(
                    f"the server must answer within {limit_s:.0f} s, but {how}; its last lines "
                    f"say why:\n{self.log}"
                )
            time.sleep(OFTEN_S)


def servers_folder() -> Path:
    """Where servers that were started here have their folders."""
    return cache_dir() / "servers"


@contextlib.contextmanager
def running(
    command: Callable[[Path], Sequence[str]],  # by the server's folder
    environment: Callable[[Path, str], Mapping[str, str]],  # by its folder and its key
) -> Iterator[Started]:
    """A server within a ``with``; behind it its processes are gone, and its folder.

    It runs in a session of its own, so that Ctrl-C at a terminal reaches the caller alone, who ends
    it. Raises InputError where processes cannot be told apart.
    """
    if not are_known():
        raise InputError(
            "a server can be started on Linux, which tells processes apart, got another system; "
            "start one yourself, and name its base_url"
        )
    end_left_behind()
    key = secrets.token_hex(16)
    folder = make_folder(servers_folder()) / key[:8]
    folder.mkdir(mode=0o700)
    record = {"place": place(), "mark": f"{MARK}={key}", "owner": _own()._asdict(), "server": None}
    leader: Named | None = None
    process: subprocess.Popen[bytes] | None = None
    try:
        write_json(folder / RECORD, record)
        for inner in ("work", "tmp"):
            (folder / inner).mkdir()
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(
                list(command(folder)),
                cwd=folder / "work",  # empty: python -m looks for modules where it starts
                env={**environment(folder, key), MARK: key, "TMPDIR": str(folder / "tmp")},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        leader = named(process.pid)
        assert leader is not None, "a child is there until it is waited for"
        write_json(folder / RECORD, record | {"server": leader._asdict()})
        yield Started(folder, key, process)
    except OSError as error:
        if process is not None:
            raise
        raise InputError(
            f"the server's program must be one that can be run, got {error}; name another"
        ) from error
    finally:
        if process is not None and leader is None:  # interrupted between the two
            leader = named(process.pid)
        try:
            end_family(leader, str(record["mark"]))
        finally:
            if process is not None:
                process.poll()
            if not family(leader, str(record["mark"])):  # else its record stays, for the next one
                shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """One of the loopback interface that nobody listens at."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def end_left_behind() -> int:
    """End what reports left that were killed; returns how many processes that were.

    Of a record the process that it names, by number and beginning, what is in its group, and what
    carries its mark; nothing while whoever wrote the record lives, and nothing of another machine.
    """
    folder, ended, here = servers_folder(), 0, place()
    if not folder.is_dir():
        return 0
    for own in sorted(folder.iterdir()):
        if not _is_own(own):
            continue
        record = _read(own / RECORD)
        there, owner = record.get("place"), read_named(record.get("owner"))
        if not isinstance(there, dict) or owner is None:
            continue
        if there.get("host") != here["host"]:
            continue
        if there.get("boot") == here["boot"]:
            if there.get("namespace") != here["namespace"] or owner.lives:
                continue
            mark = record.get("mark")
            if not isinstance(mark, str) or not re.fullmatch(f"{MARK}=[0-9a-f]{{32}}", mark):
                continue
            ended += end_family(read_named(record.get("server")), mark)
        shutil.rmtree(own, ignore_errors=True)  # of before the machine was started: nothing lives
    return ended


def _is_own(folder: Path) -> bool:
    """Whether it is a folder of this user's; it may go away meanwhile, by another report."""
    try:
        status = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _read(file: Path) -> dict[str, object]:
    try:
        found = parse_json(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _own() -> Named:
    found = named(os.getpid())
    assert found is not None, "this process is there"
    return found
