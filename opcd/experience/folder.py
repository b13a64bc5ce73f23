"""The folder of a loop: what it was given, and what its phases have found."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.experience.exercises import Exercises
from opcd.experience.settings import Settings, as_dict
from opcd.models.digest import model_digest
from opcd.runtime.files import make_folder, write_json

FILE = "settings.json"
FIRST, LAST = "before.json", "test"  # what the first phase leaves, and where the last one does


class Given(NamedTuple):
    """What a loop is given, read and checked."""

    settings: Settings
    folder: Path
    exercises: Exercises


def begin(settings: Settings, exercises: Exercises, resume: bool) -> Given:
    """What is given, in a folder that may be used for it.

    Raises InputError for a loop that would go on with other exercises, settings or models.
    """
    folder = make_folder(Path(settings.training.output_dir))
    file = folder / FILE
    now: dict[str, Any] = {
        "settings": as_dict(settings),
        "rounds": settings.experience.rounds,
        "data": _digest(exercises),
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
    return Given(settings._replace(training=training), folder, exercises)


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


def _digest(exercises: Exercises) -> str:
    rows = [[[it.messages, it.answers] for it in part] for part in exercises.parts]
    attempts = [attempt.as_dict() for attempt in exercises.logged[0]] if exercises.logged else []
    return hashlib.sha256(json.dumps([rows, attempts]).encode()).hexdigest()
