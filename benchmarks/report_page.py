"""A report of `gpu_report.py` as a page of Markdown: every figure, floor, gap and failure."""

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.rows import Row, cases, facts, provider

WHAT = """\
A floor is the least time of the work by a fixed formula (`benchmarks/floors.py`), at the rates
that were measured in the same process; a floor's share is that over the time, and 1 would be the
speed of a large product and of a triad. `sheet` means the rates of the maker's data sheet. For
errors the row `plain-fp32` is the floor: fp32 arithmetic, its results rounded to bf16.
"""
REDUCED = """\
**This is the CPU form: there was no GPU.** The problems are smaller, Triton's kernels run in its
interpreter where they run at all, and no figure here says anything about a GPU.
"""


def page(report: dict[str, Any]) -> str:
    """The whole page."""
    machine = report["machine"]
    title = f"# Report: {machine.get('device', 'a machine that did not say what it is')}"
    lines = [title, "", *([] if report["form"] == "gpu" else [REDUCED]), WHAT]
    lines += ["| | |", "|---|---|", *(f"| {k} | {_cell(v)} |" for k, v in machine.items()), ""]
    lines += ["| part | state | seconds | of at most | failed | gaps |", "|---" * 6 + "|"]
    for part in report["parts"]:
        cells = [part["name"], part["state"], part.get("seconds", ""), part.get("limit_s", "")]
        cells += [len(part.get("failures", [])), len(part.get("gaps", []))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    for part in report["parts"]:
        state = part["state"].capitalize()
        lines += ["", f"## {part['name']}", "", f"{part['question']}. {state}.", *_part(part)]
    return "\n".join(lines) + "\n"


def _part(part: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    if "tests" in part:
        counts = ", ".join(f"{n} {what}" for what, n in part["tests"].items())
        lines += ["", f"{counts}."]
    rows = part.get("rows") or []
    for name, group in cases([row for row in rows if "provider" in row]):
        lines += ["", f"{': '.join(name)}", "", *_table(group)]
    for row in rows:
        if "provider" not in row:
            lines += ["", *_timeline(row)]
    if text := part.get("output"):
        lines += ["", "```", text, "```"]
    if gaps := part.get("gaps"):
        lines += ["", "Gaps:", "", *(f"- {gap}" for gap in gaps)]
    for names, traceback in _distinct(part.get("failures", [])):
        lines += ["", f"### Failed: {names[0]}", ""]
        if others := names[1:]:
            lines += [f"And by the same error: {', '.join(others)}.", ""]
        lines += ["```", traceback, "```"]
    return lines


def _distinct(failures: list[dict[str, str]]) -> list[tuple[list[str], str]]:
    """The names of what failed by one error, and the first one's traceback; the JSON has all."""
    found: dict[str, tuple[list[str], str]] = {}
    for failure in failures:
        lines = failure["traceback"].splitlines()
        error = "\n".join(x for x in lines if x.startswith("E ")) or "\n".join(lines[-1:])
        found.setdefault(error, ([], failure["traceback"]))[0].append(failure["name"])
    return list(found.values())


def _table(rows: list[Row]) -> list[str]:
    """Providers down, the median and what else was found across."""
    keys = [k for k in ("median_s",) if any(k in row for row in rows)]
    keys += dict.fromkeys(k for row in rows for k in facts(row))
    columns = [k for k in keys if any(row.get(k) is not None for row in rows)]
    return _grid(columns, {provider(row): row for row in rows})


def _grid(columns: Iterable[str], lines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table whose first column are the names of the lines."""
    columns = list(columns)
    head = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    cells = {name: " | ".join(_cell(line.get(k)) for k in columns) for name, line in lines.items()}
    return [*head, *(f"| {name} | {line} |" for name, line in cells.items())]


def _timeline(row: Row) -> list[str]:
    """Phases down; the largest gaps and the longest kernels of each."""
    phases = {k: v for k, v in row.items() if isinstance(v, dict) and "wall_ms" in v}
    columns = ("wall_ms", "busy_ms", "idle_share", "launches", "kernels")
    lines = [f"{row.get('model', '')}, under a profiler, a step:", "", *_grid(columns, phases)]
    for name, found in phases.items():
        gaps, top = found["gaps"][:3], found["top"][:3]
        idle = "; ".join(f"{_cell(g['ms'])} ms in {g['host']} before {g['before']}" for g in gaps)
        busy = "; ".join(f"{_cell(k['ms'])} ms {k['name']}" for k in top)
        lines += ["", f"- {name}, idle: {idle}", f"- {name}, busy: {busy}"]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
