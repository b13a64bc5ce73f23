"""The folder of a loop: what it was given, and what its phases have found."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.experience.attempts import Attempt, problems_of, read_log
from opcd.experience.problems import read_problems
from opcd.experience.settings import Settings, as_dict
from opcd.models.digest import model_digest
from opcd.runtime.files import make_folder, write_json
from opcd.tasks.data import Example, request_of
from opcd.tasks.held_out import Parts
from opcd.tasks.replay import check_replay_apart

FILE = "settings.json"
FIRST, LAST = "before.json", "test"  # what the first phase leaves, and where the last one does


class Given(NamedTuple):
    """What a loop is given, read and checked."""

    settings: Settings
    folder: Path
    parts: Parts
    logged: tuple[list[Attempt], dict[str, int]] | None  # with what was left out, by why


def begin(settings: Settings, resume: bool) -> Given:
    """Read all that is given, in a folder that may be used for it.

    Raises InputError for whatever is wrong there, and for a loop that would go on with others.
    """
    settings.training.check()
    logged = read_log(settings.log) if settings.log is not None else None
    source = settings.log or ""
    parts = read_problems(settings.training, problems_of(logged[0], source) if logged else None)
    held_out = {"validation": parts.validation, "test": parts.test}
    check_replay_apart(settings.training, held_out)  # which a round's training does not see
    if logged:
        logged = _without_held_out(*logged, parts)
    folder = make_folder(Path(settings.training.output_dir))
    file = folder / FILE
    now: dict[str, Any] = {
        "settings": as_dict(settings),
        "rounds": settings.experience.rounds,
        "data": _digest(parts, logged),
        "model": model_digest(settings.training.model),
        "today": settings.training.today or date.today().isoformat(),
    }
    if resume:
        now["today"] = _checked(file, now)["today"]
    elif (folder / FIRST).exists():
        raise InputError(
            f"output_dir must not hold a loop yet, got {str(folder)!r} with one; resume it, or "
            f"choose another output_dir"
        )
    write_json(file, now)
    training = replace(settings.training, today=now["today"])
    return Given(settings._replace(training=training), folder, parts, logged)


def kept(path: Path, make: Callable[[], Any]) -> Any:
    """What a file holds; where it is not there, what is made, which it then holds."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text(encoding="utf-8"))


def _checked(file: Path, now: dict[str, Any]) -> dict[str, Any]:
    """What the loop was begun with. Raises InputError where it would go on otherwise."""
    if not file.is_file():
        raise InputError(
            f"to resume there must be a loop, got no {file}; start one without resume, or name its "
            f"output_dir if it was moved"
        )
    before = json.loads(file.read_text(encoding="utf-8"))
    own, others = before["settings"], now["settings"]
    if changed := sorted(name for name in others if own.get(name) != others[name]):
        raise InputError(
            f"a resumed loop must keep its settings, got other values for {', '.join(changed)}; "
            f"take them from {file}, or start another output_dir"
        )
    for what, words in (("data", "problems"), ("model", "model")):
        if before[what] != now[what]:
            raise InputError(
                f"a resumed loop must have the {words} that it was begun with, got others; restore "
                f"them, or start another output_dir"
            )
    if now["rounds"] != before["rounds"] and (file.parent / LAST).exists():
        raise InputError(
            f"a loop's test problems are looked at once, at its end, and {file.parent} has done so "
            f"after {before['rounds']} rounds, got rounds {now['rounds']}; start another output_dir"
        )
    return before


def _without_held_out(
    attempts: list[Attempt], skipped: dict[str, int], parts: Parts
) -> tuple[list[Attempt], dict[str, int]]:
    """The attempts at problems that may be learned from."""
    known = {request_of(problem) for problem in parts.train}
    found = [a for a in attempts if request_of(Example(tuple(a.problem), (), "")) in known]
    left_out = len(attempts) - len(found)
    return found, skipped | ({"at validation or test problems": left_out} if left_out else {})


def _digest(parts: Parts, logged: tuple[list[Attempt], dict[str, int]] | None) -> str:
    rows = [[[p.messages, p.answers] for p in part] for part in parts]
    attempts = [attempt.as_dict() for attempt in logged[0]] if logged else []
    return hashlib.sha256(json.dumps([rows, attempts]).encode()).hexdigest()
