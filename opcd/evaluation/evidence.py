"""What a scorecard and a model came from, and what became of it: evidence.json.

Nobody signs it. It lets somebody who doubts hold every file against what was there when the figures
were made (`verify`); that the figures are of these weights, only scoring them again proves.
"""

import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from opcd.config import TrainConfig
from opcd.config.fields import FIELDS
from opcd.config.settings import CODE, FILES_BY_NAME, INPUT_FILES, MODELS
from opcd.errors import InputError
from opcd.evaluation.measured import measured_by
from opcd.models.digest import file_digests, local_folder
from opcd.runtime.environment import environment
from opcd.runtime.files import file_digest, json_text, write_json
from opcd.runtime.strict_json import parse_json
from opcd.tasks.prepare import Setup

FILE, FORMAT = "evidence.json", 1
CARD = "scorecard.json"
# What a run writes and a page shows, or a scorecard is made from.
OUTPUTS = (
    *("config.yaml", "changes.jsonl", "metrics.jsonl", "guided.jsonl", "check.json"),
    *("answers.jsonl", "elsewhere.jsonl", "leak.jsonl", "answers.csv", "report.md"),
    "serving.json",
)
FINAL = "final"
# Fields that hold paths, which change where a run is moved; and what is no matter to a figure.
PLACES = {*INPUT_FILES, *FILES_BY_NAME, *MODELS, *CODE, "output_dir", "without_texts"}


def write_evidence(
    folder: Path,  # of the run, or of another scorecard
    setup: Setup,
    card: dict[str, Any] | None,  # that will be written; None: nothing was scored
    distilled: str | None,  # the model's folder or name
) -> dict[str, Any]:
    """Write evidence.json; everything but the scorecard must have been written. Returns it."""
    config = setup.config
    outputs = {name: file_digest(folder / name) for name in OUTPUTS if (folder / name).is_file()}
    if card is not None:
        outputs[CARD] = text_digest(json_text(card))
    found = {
        "format": FORMAT,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "made_by": environment(setup.device),
        "settings": _settings(config),
        "seeds": {"run": config.seed, "intervals": 0},
        "inputs": {name: _input(path) for name, path in input_files(config).items()},
        "measured_by": measured_by(setup),
        "weights": {
            "in": _model(config.model),
            "teacher": _model(config.teacher) if config.teacher else None,
            "out": _out(folder, distilled) if distilled is not None else None,
        },
        "outputs": outputs,
    }
    write_json(folder / FILE, found)
    return found


def renew_outputs(folder: Path, names: Sequence[str]) -> dict[str, Any] | None:
    """Put the digests of files that were written anew into evidence.json; returns it.

    What else it says stays. None where there is no evidence. Raises InputError for one that opcd
    did not write.
    """
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        found = parse_json(file.read_bytes())
        found["outputs"] |= {name: file_digest(folder / name) for name in names}
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{file} must be as opcd writes it, got {type(error).__name__}: {error}; score the run "
            f"again with opcd eval"
        ) from error
    write_json(file, found)
    return dict(found)


def input_files(config: TrainConfig) -> dict[str, str]:
    """The files that a configuration names, by field; of a Python scorer the file it is in."""
    found = {name: path for name in INPUT_FILES if (path := getattr(config, name))}
    for name in FILES_BY_NAME:
        found |= {f"{name}.{key}": path for key, path in getattr(config, name).items()}
    kind, _, target = config.scorer.partition(":")
    place = target.rpartition(":")[0]
    if kind == "python" and place.endswith(".py"):
        found["scorer"] = place
    return found


def tree_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder and below, by its path in there; hidden ones, which nothing
    reads and file managers leave, do not count."""
    return {
        path.relative_to(folder).as_posix(): file_digest(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def text_digest(text: str) -> str:
    """SHA-256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def comparable_settings(config: TrainConfig) -> dict[str, Any]:
    """The settings that stay the same wherever the files of a run lie."""
    return {name: getattr(config, name) for name in FIELDS if name not in PLACES}


def _settings(config: TrainConfig) -> dict[str, Any]:
    """Every field; without texts, of what people wrote the digest alone."""
    found = {name: getattr(config, name) for name in FIELDS}
    if config.without_texts and config.without_context not in ("default", "none"):
        found["without_context"] = {"sha256": text_digest(config.without_context)}
    if config.without_texts and config.stop:
        found["stop"] = {"sha256": text_digest("\0".join(config.stop))}
    return found


def _input(path: str) -> dict[str, Any]:
    there = Path(path).is_file()
    return {"file": path, "sha256": file_digest(Path(path)) if there else None}


def _model(name: str) -> dict[str, Any]:
    folder = local_folder(name)
    return {"name": name, "files": file_digests(folder) if folder is not None else None}


def _out(folder: Path, distilled: str) -> dict[str, Any]:
    own = folder / FINAL
    if own.is_dir() and Path(distilled).is_dir() and own.samefile(distilled):
        return {"name": FINAL, "files": tree_digests(own)}
    return _model(distilled)
