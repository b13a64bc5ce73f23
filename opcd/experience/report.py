"""What a loop has come to, for people: report.md with its curve."""

from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from opcd import __version__
from opcd.evaluation.figure import blank_figure
from opcd.evaluation.intervals import PerRequest, paired_difference
from opcd.experience.settings import Settings
from opcd.runtime.files import write_text

SHOWN_LINES = 60  # of a context


def write_report(
    folder: Path,
    rounds: Sequence[Mapping[str, Any]],  # as in rounds.jsonl
    contexts: Mapping[int, Sequence[Path]],  # that each round found worth distilling
    columns: Mapping[str, Any],
    settings: Settings,
) -> None:
    """Write report.md, and curve.png where there is a round."""
    text = [f"# {settings.training.model}, from its own attempts\n"]
    if columns:
        text += ["## Test problems\n", "Looked at once, behind the last round.\n"]
        text += [*table(columns), "", *(f"- {line}" for line in differences(columns)), ""]
    if rounds:
        draw_curve(rounds, folder / "curve.png")
        text += ["## Rounds\n", "![accuracy on validation problems by round](curve.png)\n"]
        text += round_lines(rounds)
    for row in rounds:
        for path in contexts[row["round"]] if not settings.training.without_texts else ():
            lines = path.read_text(encoding="utf-8").splitlines()
            more = ["..."] if len(lines) > SHOWN_LINES else []
            text += [
                f"\n## Round {row['round']}: {path.relative_to(folder)}\n",
                *("    " + line for line in [*lines[:SHOWN_LINES], *more]),
            ]
    text.append(
        f"\nAll rounds: `rounds.jsonl`. All settings: `settings.json`. opcd {__version__}, "
        f"{date.today().isoformat()}.\n"
    )
    write_text(folder / "report.md", "\n".join(text))


def table(columns: Mapping[str, Any]) -> list[str]:
    """The final test, a row a model."""
    counted = [*dict.fromkeys(name for column in columns.values() for name in column["counts"])]
    heads = ["", "right", "95 % interval", "n", *counted, "elsewhere as before", ""]
    rows = [heads, ["---"] * len(heads)]
    for name, column in columns.items():
        elsewhere = column["elsewhere"]
        rows.append(
            [
                name,
                _share(column["accuracy"]),
                _interval(column["interval_95"]),
                str(column["n"]),
                *(_count(column["counts"], what) for what in counted),
                _share(elsewhere["mean"]) if elsewhere else "–",
                column["meaning"],
            ]
        )
    return ["| " + " | ".join(cells) + " |" for cells in rows]


def differences(columns: Mapping[str, Any]) -> list[str]:
    """What was gained, problem by problem."""
    pairs = (
        ("distilled", "base"),
        ("distilled", "base_experienced"),
        ("distilled", "off_policy"),
        ("distilled_experienced", "distilled"),
    )
    found = []
    for one, other in pairs:
        if one not in columns or other not in columns:
            continue
        both = [
            (a, b)
            for a, b in zip(columns[one]["values"], columns[other]["values"], strict=True)
            if a is not None and b is not None
        ]
        if not both:
            continue
        each = [1.0] * len(both)
        apart = paired_difference(
            PerRequest([a for a, _ in both], each), PerRequest([b for _, b in both], each)
        )
        low, high = (100 * x for x in apart.interval)
        found.append(
            f"{one} against {other}: {100 * apart.mean:+.1f} points ({low:+.1f} – {high:+.1f}, "
            f"p {apart.p_value:.2g})"
        )
    return found


def round_lines(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rounds as a table, and why each was taken or not."""
    lines = [
        "| round | attempts right | items | contexts | without | best context | distilled | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rounds:
        counts, candidates = row["attempts"], row["candidates"]
        distilled = row["distilled"]
        lines.append(
            f"| {row['round']} | {counts['right']} of {counts['judged']} | {row['items']} | "
            f"{len(candidates)} | {_share(row['without']['accuracy'])} | "
            f"{_share(candidates[0]['accuracy']) if candidates else '–'} | "
            f"{_share(distilled['accuracy']) if distilled else '–'} | "
            f"{'accepted' if row['accepted'] else 'rolled back'} |"
        )
    lines.append("")
    lines += [f"- round {row['round']}: {row['reason']}" for row in rounds]
    lines += [
        f"- round {row['round']}: {count} attempts dropped, {why}"
        for row in rounds
        for why, count in row["attempts"]["dropped"].items()
    ]
    for row in rounds:
        told = [
            ", ".join(f"{value:.2f} {what}" for what, value in found["counts"].items())
            for found in (row["attempts"], row["without"], row["distilled"] or {"counts": {}})
        ]
        if told[0]:
            lines.append(
                f"- round {row['round']}, means: attempts {told[0]}; validation without {told[1]}"
                + (f", distilled {told[2]}" if told[2] else "")
            )
    return lines


def draw_curve(rounds: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy on validation problems over the rounds, as a PNG."""
    from matplotlib.ticker import MaxNLocator

    first = rounds[0]["without"]
    points = [(0, first, True)]
    points += [(r["round"], r["distilled"], r["accepted"]) for r in rounds if r["distilled"]]
    points = [point for point in points if point[1]["accuracy"] is not None]
    best = [
        (row["round"], row["candidates"][0])
        for row in rounds
        if row["candidates"] and row["candidates"][0]["accuracy"] is not None
    ]
    figure = blank_figure((6, 3.4))
    axis = figure.subplots()
    for taken, mark, label in ((True, "o", "the weights"), (False, "x", "rolled back")):
        own = [(n, found) for n, found, accepted in points if accepted == taken]
        if not own:
            continue
        values = [100 * found["accuracy"] for _, found in own]
        bars = [
            [
                max(0.0, 100 * sign * (found["interval_95"][end] - found["accuracy"]))
                for _, found in own
            ]
            for end, sign in ((0, -1), (1, 1))
        ]
        line = "-" if taken else ""
        axis.errorbar(
            [n for n, _ in own], values, bars, fmt=f"{mark}{line}", capsize=3, label=label
        )
    if best:
        axis.plot(
            [n - 0.5 for n, _ in best],
            [100 * found["accuracy"] for _, found in best],
            "s",
            color="C2",
            label="behind the best context",
        )
    axis.set(xlabel="round", title="right on validation problems, %", ylim=(-3, 103))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)


def _count(counts: Mapping[str, float], what: str) -> str:
    return f"{counts[what]:.2f}" if what in counts else "–"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _interval(ends: Sequence[float] | None) -> str:
    return "–" if ends is None else f"{ends[0]:.1%} – {ends[1]:.1%}"
