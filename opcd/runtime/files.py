"""Files and folders that are complete or absent, whenever the process is killed."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opcd.errors import InputError
from opcd.runtime.strict_json import parse_json


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Call ``write(folder)`` on a folder aside, then put that in the place of `target`.

    What was begun is gone where that fails, and `target` is what it was. Files get the modes that
    the umask asks for, whoever wrote them.
    """
    aside = target.with_name(f".writing-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        mode = aside.stat().st_mode & 0o666
        for file in aside.rglob("*"):
            if file.is_file():
                file.chmod(mode)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    doomed = _doomed(target)
    if target.exists():
        target.rename(doomed)
    aside.rename(target)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder; one that is being deleted no longer carries its name."""
    if folder.exists():
        doomed = _doomed(folder)
        folder.rename(doomed)
        shutil.rmtree(doomed)


def _doomed(folder: Path) -> Path:
    """A free name beside the folder, for what is being deleted."""
    doomed = folder.with_name(f".removing-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    return doomed


def shown(path: str) -> str:
    """A path for people: from the current folder, where it lies in it."""
    with contextlib.suppress(ValueError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def shown_size(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def folder_bytes(folder: Path) -> int:
    """What the files in a folder take."""
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def free_bytes(folder: Path) -> int:
    """Room on the disk of a folder that is there."""
    return shutil.disk_usage(folder).free


def make_folder(folder: Path) -> Path:
    """Create the folder if need be. Raises InputError if nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writing-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(
            f"the output must go to a folder that can be written, got {str(folder)!r}: "
            f"{error.strerror}; choose another"
        ) from error
    return folder


def free_name(folder: Path) -> Path:
    """`folder`, or the first of folder-2, folder-3, ... that is not there yet."""
    numbered = (folder.with_name(f"{folder.name}-{i}") for i in range(2, 10_000))
    return next(f for f in (folder, *numbered) if not f.exists())


def write_text(target: Path, text: str) -> None:
    """Write UTF-8 text aside, then put it in the place of `target`."""
    aside = target.with_name(f".writing-{target.name}")
    aside.write_text(text, encoding="utf-8", newline="\n")  # the same bytes on every system
    aside.replace(target)


def write_json(target: Path, value: Any) -> None:
    """Write JSON, indented for people."""
    write_text(target, json_text(value))


def json_text(value: Any) -> str:
    """What `write_json` writes."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def write_jsonl(target: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(target, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a file that a run wrote, a line each; [] where there is none.

    Raises InputError, with the line, for anything else.
    """
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise InputError(f"{path}:{number}: must be JSON, got {error}; restore it") from error
        if not isinstance(row, dict):
            raise InputError(f"{path}:{number}: must be a JSON object, got {line[:40]!r}")
        rows.append(row)
    return rows


def _lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file, ended by line feeds alone: texts hold other ends of lines."""
    if not path.is_file():
        return []
    try:
        return [line for line in path.read_text(encoding="utf-8").split("\n") if line]
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8, got {error}; restore it") from error


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def read_metrics(path: Path, last_step: int | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl up to `last_step`; a line cut off by a kill is left out."""
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = parse_json(line)
            except ValueError:
                continue
            if not isinstance(row, dict) or "step" not in row:  # nobody's that trains here
                continue
            if last_step is None or row["step"] <= last_step:
                rows.append(row)
    return rows
