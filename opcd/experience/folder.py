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
from opcd.experience.settings import PYTHON, Settings, as_dict
from opcd.models.digest import model_digest
from opcd.runtime.files import write_json
from opcd.runtime.untrusted import check_run_folder
from opcd.scoring.scorers import load_scorer
from opcd.tasks.records import read_text

FILE = "settings.json"
ROUND = "round-"  # and its number: the folder of a round
RUNS = ("run", "off_policy")  # those of a round
FIRST, LAST = "before.json", "test"  # what the first phase leaves, and where the last one does
# What else stands there under names that others use as well.
OTHERS = (
    *("elsewhere.json", "rounds.jsonl", "report.md", "curve.png", f"{ROUND}1"),
    *("validation.jsonl", "test.jsonl"),
)
FILES = ("items_prompt", "elsewhere_data", "replay_data", "chat_template")  # that settings name


class Given(NamedTuple):
    """What a loop is given, read and checked."""

    settings: Settings
    folder: Path
    exercises: Exercises


def begin(settings: Settings, exercises: Exercises, resume: bool) -> Given:
    """What is given, in a folder that may be used for it.

    Raises InputError for a loop that would go on with other exercises, settings or models.
    """
    # Its runs name files of rounds, which lie beside them: from anywhere, and when they go on.
    folder = Path(settings.training.output_dir).expanduser().absolute()
    file = folder / FILE
    now: dict[str, Any] = {
        "settings": as_dict(settings),
        "rounds": settings.experience.rounds,
        "data": _digest(exercises),
        "model": model_digest(settings.training.model),
        "files": _digests(settings),
        "today": settings.training.today or date.today().isoformat(),
    }
    if resume:
        for run in RUNS:
            for there in sorted(folder.glob(f"{ROUND}*/{run}")):
                check_run_folder(there)  # which may be a stranger's
        now["today"] = _checked(file, now)["today"]
    elif (folder / FIRST).exists():
        raise InputError(
            f"output_dir must not hold a loop yet, got {str(folder)!r} with one; resume it, or "
            f"choose another output_dir"
        )
    else:
        _check_free(file)
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
    files = before.get("files", {})  # loops of before they were kept go on
    if changed := sorted(name for name in files if files[name] != now["files"].get(name)):
        raise InputError(
            f"a resumed loop must have the files that it was begun with, got another text of "
            f"{', '.join(changed)}; restore it, or start another output_dir"
        )
    made = [int(f.name.removeprefix(ROUND)) for f in file.parent.glob(f"{ROUND}[0-9]*")]
    if now["rounds"] < max(made, default=0):
        raise InputError(
            f"a resumed loop may have more rounds, and none less than were begun, got rounds "
            f"{now['rounds']} where {file.parent} has {max(made)}; set rounds to that at least"
        )
    if now["rounds"] != before["rounds"] and (file.parent / LAST).exists():
        raise InputError(
            f"a loop's test problems are looked at once, at its end, and {file.parent} has done so "
            f"after {before['rounds']} rounds, got rounds {now['rounds']}; start another output_dir"
        )
    return before


def _check_free(file: Path) -> None:
    """Raise InputError for a folder in which something would be replaced that no loop has left."""
    try:
        own = {"settings", "rounds"} <= set(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        own = False
    there = [name for name in (FILE, *OTHERS, LAST) if (file.parent / name).exists()]
    if there and not own:
        raise InputError(
            f"output_dir must not hold files of yours that the loop's own would replace, got "
            f"{str(file.parent)!r} with {', '.join(there)}; choose another output_dir"
        )


def _digests(settings: Settings) -> dict[str, str]:
    """Of files whose texts decide what comes of a loop, by the setting that names them."""
    given = as_dict(settings)
    found = {name: read_text(given[name], name) for name in FILES if given[name]}
    if given["game"] is None:
        found["scorer"] = load_scorer(given["scorer"]).identity
    elif (place := given["game"].removeprefix(PYTHON).rpartition(":")[0]).endswith(".py"):
        found["game"] = read_text(place, "game")
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in found.items()}


def _digest(exercises: Exercises) -> str:
    rows = [[[it.messages, it.answers] for it in part] for part in exercises.parts]
    attempts = [attempt.as_dict() for attempt in exercises.logged[0]] if exercises.logged else []
    return hashlib.sha256(json.dumps([rows, attempts]).encode()).hexdigest()
