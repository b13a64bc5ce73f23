"""Plots of stored results: a panel a problem, a bar a provider, its numbers beside it.

A row that knows its phases is drawn as a bar of them, beside their sum. Where a row knows its share
of a floor, a line shows the floor. The background is opaque, so that pages in light and dark show
the same.
"""

import statistics
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from benchmarks.rows import Row, is_ours, problem, provider, read, words

DOCS = Path(__file__).parent.parent / "docs"
COLUMNS = {  # facts beside the bars
    "floor_share": ("of floor", "{:.0%}"),
    "gradient_error": ("error", "{:.1%}"),
    "scratch_mib": ("MiB", "{:.0f}"),
    "peak_mib": ("MiB", "{:.0f}"),
    "tokens_per_s": ("tokens/s", "{:.0f}"),
}
CUT = 4  # a bar is cut at that many times the slowest of ours
OURS, PEER, LINE, INK, QUIET = "#1f6f5c", "#b9b4a8", "#b3401f", "#33312c", "#6b675e"
PHASES = {"rollout_s": "#6d8ab8", "teacher_s": "#d9a441", "update_s": "#8d6a9f"}  # of a step
STYLE = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans", "Verdana"],
    "svg.hashsalt": "opcd",  # the same rows give the same file
    "font.size": 8,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": QUIET,
    "ytick.color": INK,
}
COLUMN_POINTS = 46
BESIDE: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
CUT_MARK: dict[str, Any] = {"color": "white", "ha": "right", "va": "center", "fontsize": 12}
Bars = dict[str, Row]  # by provider


def draw_results(files: Iterable[Path]) -> list[Path]:
    """docs/NAME.svg of each results/NAME.json that holds times."""
    drawn = []
    for file in files:
        rows = [row for row in read(file) if "median_s" in row]
        if rows:
            drawn.append(DOCS / f"{file.stem}.svg")
            draw(rows, drawn[-1])
    return drawn


def draw(rows: list[Row], file: Path) -> None:
    """All problems of one question."""
    shared, panels = _panels(rows)
    across = 1 if len(panels) <= 3 else 2
    lines = [list(panels.items())[i : i + across] for i in range(0, len(panels), across)]
    slots = [max(len(bars) for _, bars in line) for line in lines]
    heights = [0.65 + 0.24 * n for n in slots]  # inches
    in_ms = max([_total(row) for row in rows if is_ours(row)], default=1) < 0.5
    place = f"{rows[0]['device']}, torch {rows[0]['torch']}, {rows[0]['date']}"
    with plt.rc_context(STYLE):
        figure, grid = plt.subplots(
            len(lines),
            across,
            figsize=(8 if across == 1 else 13, 1.1 + sum(heights)),
            height_ratios=heights,
            squeeze=False,
            layout="constrained",
        )
        for axes in grid.flat:
            axes.set_axis_off()
        for axes_of_line, line, n in zip(grid, lines, slots, strict=True):
            for axes, (title, bars) in zip(axes_of_line, line, strict=False):
                _draw_panel(axes, bars, in_ms)
                axes.set_ylim(n - 0.4, -0.6)
                axes.set_title(textwrap.fill(title, 62), loc="left", fontsize=9, pad=14)
        figure.suptitle(f"{rows[0]['question']}: {shared}\n{place}", x=0.01, ha="left", fontsize=9)
        _legend(figure, grid[0, 0])
        figure.savefig(file, metadata={"Date": None})
        plt.close(figure)


def _panels(rows: list[Row]) -> tuple[str, dict[str, Bars]]:
    """What all problems share, and the rows by the rest of their problem and by provider."""
    problems = [problem(row) for row in rows]
    shared = {k: v for k, v in problems[0].items() if all(p.get(k) == v for p in problems)}
    panels: dict[str, Bars] = {}
    for row, facts in zip(rows, problems, strict=True):
        title = words({k: v for k, v in facts.items() if k not in shared})
        panels.setdefault(title, {})[provider(row)] = row
    return words(shared), panels


def _draw_panel(axes: Axes, bars: Bars, in_ms: bool) -> None:
    unit, scale = ("ms", 1000) if in_ms else ("s", 1)
    totals = [scale * _total(row) for row in bars.values()]
    ours = [t for t, row in zip(totals, bars.values(), strict=True) if is_ours(row)]
    limit = min(1.05 * max(totals), CUT * max(ours or totals))
    axes.set_axis_on()
    for y, (row, total) in enumerate(zip(bars.values(), totals, strict=True)):
        left = 0.0
        parts = PHASES if _phased(row) else {"median_s": OURS if is_ours(row) else PEER}
        for part, color in parts.items():
            time, label = scale * row[part], part.removesuffix("_s") if part in PHASES else None
            axes.barh(y, time, left=left, color=color, height=0.72, label=label)
            left += time
        if total > limit:
            axes.annotate("»", (limit, y), (-3, 0), textcoords="offset points", **CUT_MARK)
        elif not _phased(row):
            spread = [scale * row["min_s"], scale * row["max_s"]]
            axes.plot(spread, [y, y], color=INK, linewidth=0.8)
    if floors := [r["floor_share"] * r["median_s"] for r in bars.values() if "floor_share" in r]:
        label = "floor: the products that nobody can avoid"
        axes.axvline(scale * statistics.median(floors), color=LINE, linewidth=1.2, label=label)
    for i, (head, cells) in enumerate(_columns(bars, unit, scale).items(), start=1):
        for y, cell in enumerate([head, *cells], start=-1):
            color = QUIET if y < 0 else INK
            offset = (COLUMN_POINTS * i, 0)
            axes.annotate(cell, (1, y), offset, ha="right", va="center", color=color, **BESIDE)
    axes.set_xlim(0, limit)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(unit, color=QUIET)
    axes.spines[["top", "right"]].set_visible(False)


def _phased(row: Row) -> bool:
    return all(phase in row for phase in PHASES)


def _total(row: Row) -> float:
    """Seconds: of all phases, or of what was timed."""
    return sum(row[phase] for phase in PHASES) if _phased(row) else row["median_s"]


def _columns(bars: Bars, unit: str, scale: int) -> dict[str, list[str]]:
    """The numbers beside the bars, by their heading."""
    columns = {}
    if all(map(_phased, bars.values())):
        for phase in PHASES:
            times = [_number(scale * row[phase]) for row in bars.values()]
            columns[phase.removesuffix("_s")] = times
    columns[unit] = [_number(scale * _total(row)) for row in bars.values()]
    for fact, (head, form) in COLUMNS.items():
        values = [row.get(fact) for row in bars.values()]
        if head not in columns and any(v is not None for v in values):
            columns[head] = ["" if v is None else form.format(v) for v in values]
    return columns


def _number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def _legend(figure: plt.Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))  # each phase once
    figure.legend(
        list(entries.values()),
        list(entries),
        title=f"Medians; thin lines: fastest to slowest round; »: beyond {CUT} times ours",
        loc="outside lower left",
        ncols=6,
        frameon=False,
        alignment="left",
    )
