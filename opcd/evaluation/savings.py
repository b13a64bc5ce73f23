"""What a server was measured to save, where it was: serving.json, for report and page."""

from pathlib import Path
from typing import Any, NamedTuple

from opcd.runtime.files import file_digest
from opcd.runtime.strict_json import parse_json

FILE = "serving.json"
SELECTION = Path("final", "selection.json")  # which tells one exported model from the next


class Savings(NamedTuple):
    """For people."""

    summary: list[str]
    table: list[list[str]]  # a head, and a row a contender; [] without


def savings(folder: Path) -> Savings | None:
    """What lies in a run's folder; None without it, and where it is of a model before this one."""
    file = folder / FILE
    try:
        found = parse_json(file.read_bytes()) if file.is_file() else None
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("summary"), list):
        return None
    if (of := found.get("selection_sha256")) is not None and of != selection_digest(folder):
        return None
    rows: Any = found.get("table")
    table = [[str(cell) for cell in row] for row in rows] if _is_table(rows) else []
    return Savings([str(line) for line in found["summary"]], table)


def selection_digest(folder: Path) -> str | None:
    """Of how the exported model was chosen; None where nothing says."""
    file = folder / SELECTION
    return file_digest(file) if file.is_file() else None


def savings_section(folder: Path) -> list[str]:
    """Lines of report.md."""
    found = savings(folder)
    if found is None:
        return []
    text = ["\n## What it saves\n", *(f"- {line}" for line in found.summary)]
    if found.table:
        head, *rows = found.table
        text += ["", _row(head), _row(["---", *["---:"] * (len(head) - 1)])]
        text += map(_row, rows)
    return text


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _is_table(rows: Any) -> bool:
    return (
        isinstance(rows, list)
        and all(isinstance(row, list) for row in rows)
        and len({len(row) for row in rows}) == 1
    )
