"""Drawings of a page: SVG that stands in it, and takes its colours, light or dark."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from opcd.evaluation.report import MINIMISED

POINTS = 240  # of a line: more are not told apart, and a page has a size
POSITIONS = 48  # of tokens; longer answers are drawn in parts of several
FEWEST = 3  # answers that are as long: a mean of fewer says nothing
INCHES = 4.8, 2.9
# What matplotlib is given, and what the page has in its place.
INK = {"#010101": "currentColor", "#020202": "var(--line)"}
SERIES = {f"#01010{i}": f"var(--s{i})" for i in range(2, 7)}
BLUE, ORANGE, GREEN, PURPLE, RED = SERIES


class Plot(NamedTuple):
    """A drawing, and what it says in words; "" where a table beside it does."""

    title: str
    words: str
    svg: str


class Line(NamedTuple):
    """A series of points, and how it is told from the others without colour."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    style: str = "-"


def accuracy_plot(columns: Mapping[str, Any]) -> Plot:
    """Each contender's accuracy with its interval; without accepted answers how far it agrees."""
    judged = "accuracy" in next(iter(columns.values()))
    found = {
        name: (c["accuracy"], c["accuracy_interval_95"])
        if judged
        else (c["greedy_agreement"]["mean"], c["greedy_agreement"]["interval_95"])
        for name, c in columns.items()
    }

    def draw(axis: Any) -> None:
        for i, (mean, (low, high)) in enumerate(reversed(found.values())):
            axis.plot([100 * low, 100 * high], [i, i], color=BLUE, linewidth=3, alpha=0.45)
            axis.plot([100 * mean], [i], "o", color=BLUE, markersize=8)
        names = [name.replace("_", "\n") for name in reversed(found)]
        axis.set_yticks(range(len(found)), names)
        axis.set(xlim=(-3, 103), ylim=(-0.6, len(found) - 0.4), xlabel="%")
        axis.grid(axis="x")

    what = "Right answers" if judged else "Answers that are the prompted model's"
    return Plot(f"{what}, with 95% intervals", "", _svg("accuracy", draw))


def training_plots(metrics: Sequence[Mapping[str, Any]], forward_share: float) -> list[Plot]:
    """Divergence and validation over the steps; [] where nothing was trained."""
    steps = [m for m in metrics if "loss" in m]
    validated = [m for m in metrics if "validation" in m]
    if not steps:
        return []
    own = _over(steps, lambda m: m.get("divergence"))
    lines = [
        Line(f"training, {MINIMISED.get(forward_share, 'mixture')}", _thinned(own), BLUE),
        Line("guided", _thinned(_over(steps, lambda m: m.get("guided_loss"))), PURPLE, ":"),
        Line("held out", _over(validated, lambda m: m["validation"].get("divergence")), RED, "o-"),
        Line("gap", _over(validated, lambda m: m["validation"].get("gap")), ORANGE, "s--"),
    ]
    plots = [_over_steps("Divergence to the teacher, nats a token", "divergence", lines)]
    if validated:
        judged = "accuracy" in validated[0]["validation"]
        name = "accuracy" if judged else "greedy_agreement"
        line = Line(
            "validation",
            _over(validated, lambda m: 100 * m["validation"].get(name, math.nan)),
            GREEN,
            "o-",
        )
        title = f"Validation: {'right answers' if judged else 'the same as prompted'}, %"
        plots.append(_over_steps(title, "validation", [line], (-3, 103)))
    lengths = _thinned(_over(steps, lambda m: m.get("mean_completion_tokens")))
    line = Line("training", lengths, ORANGE)
    plots.append(_over_steps("Length of a completion, tokens", "length", [line]))
    return [plot for plot in plots if plot.svg]


def position_plot(missed: Mapping[str, Sequence[Sequence[float]]]) -> Plot | None:
    """What models miss of the prompted one's answers, by the token's place in the answer.

    missed: nats of each token of each answer, by the model. None where there are none.
    """
    longest = max((len(tokens) for rows in missed.values() for tokens in rows), default=0)
    if not longest:
        return None
    part = math.ceil(longest / POSITIONS)
    colours = dict(zip(missed, (ORANGE, BLUE), strict=False))
    lines = [
        Line(name, _by_position(rows, part), colours[name], "s--" if i == 0 else "o-")
        for i, (name, rows) in enumerate(missed.items())
    ]
    title = "Gap by the token's place in the answer, nats"
    plot = _over_steps(title, "position", lines, of="token" if part == 1 else f"token, in {part}s")
    return plot if plot.svg else None


def _by_position(rows: Sequence[Sequence[float]], part: int) -> list[tuple[float, float]]:
    longest = max(map(len, rows), default=0)
    found = []
    for start in range(0, longest, part):
        there = [x for row in rows for x in row[start : start + part]]
        if sum(len(row) > start for row in rows) >= min(FEWEST, len(rows)):
            found.append((start + (part + 1) / 2, fmean(there)))
    return found


def _over(
    rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], Any]
) -> list[tuple[float, float]]:
    found = [(row["step"], value(row)) for row in rows]
    return [(step, y) for step, y in found if isinstance(y, (int, float)) and math.isfinite(y)]


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Means of neighbours where there are too many."""
    size = math.ceil(len(points) / POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [(fmean(x for x, _ in part), fmean(y for _, y in part)) for part in parts]


def _over_steps(
    title: str,
    name: str,
    lines: Sequence[Line],
    limits: tuple[float, float] | None = None,
    of: str = "step",
) -> Plot:
    """Lines over steps; one without points is left out, and a plot of none has no drawing."""
    lines = [line for line in lines if line.points]

    ink = next(iter(INK))

    def draw(axis: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        for line in lines:
            x, y = zip(*line.points, strict=True)
            marked = line.style[0] in "os" and len(x) > 40
            style = line.style[1:] if marked else line.style
            axis.plot(x, y, style, color=line.colour, label=line.label, markersize=4)
        lowest = min(y for line in lines for _, y in line.points)
        axis.set(xlabel=of, ylim=limits or (min(0, 1.05 * lowest), None))
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(axis="y")
        if len(lines) > 1:
            axis.legend(frameon=False, labelcolor=ink)

    ends = [f"{line.label} {line.points[0][1]:.3g} → {line.points[-1][1]:.3g}" for line in lines]
    return Plot(title, "; ".join(ends), _svg(name, draw) if lines else "")


def _svg(name: str, draw: Callable[[Any], None]) -> str:
    """A drawing for the inside of a page, with ids that no other one there has."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    ink, grid = INK
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": name,
        "font.size": 10,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), ink),
        **dict.fromkeys(("xtick.color", "ytick.color"), ink),
        "grid.color": grid,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=INCHES, layout="constrained")
        axis = FigureCanvasSVG(figure).figure.add_subplot()
        axis.spines[["top", "right"]].set_visible(False)
        draw(axis)
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return _inlined(written.getvalue(), name)


def _inlined(svg: str, name: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)  # of the whole page
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None, "matplotlib writes one"
    svg = re.sub(r"<svg[^>]*>", f'<svg {box[0]} aria-hidden="true">', svg, count=1)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: (\d+)px[^;\"]*", r"font-size: \1px", svg)  # of matplotlib before 3.11
    svg = re.sub(r"font-family: [^;\"]*;? ?| transform=\"rotate\(-0 [^\"]*\"", "", svg)
    for given, colour in (INK | SERIES).items():
        svg = svg.replace(given, colour)
    return re.sub(r"\n\s*", "\n", svg)
