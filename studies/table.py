"""The results of a study as Markdown tables, one a stage.

python -m studies.table studies/results/guided.jsonl
"""

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from studies.run import BEFORE, read

Rows = Sequence[dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="a study's rows, such as results/guided.jsonl")
    results = parser.parse_args().results
    if not results.is_file():
        parser.error(f"there must be rows, got no file {str(results)!r}")
    by_stage: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read(results):
        by_stage[row["stage"]].append(row)
    for stage, rows in by_stage.items():
        print(f"\n## {stage}\n\n{table(rows)}")
    return 0


def table(rows: Rows) -> str:
    """A line for each cell, two columns for each task: what was reached, and seconds."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    if "rivals" in rows[0]:
        return "\n\n".join(f"{task}\n\n{of_rivals(_rivals(rows, task))}" for task in tasks)
    lines = [
        f"| | {' | '.join(f'{task} | s' for task in tasks)} |",
        "|---|" + "---|" * 2 * len(tasks),
    ]
    for cell in dict.fromkeys(row["cell"] for row in rows):
        cells = []
        for task in tasks:
            found = [r for r in rows if (r["cell"], r["task"]) == (cell, task)]
            cells += [reached(found), seconds(found)] if found else ["", ""]
        lines.append(f"| {cell} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reached(rows: Rows) -> str:
    """Mean and range over seeds: test data where they were answered, else the last validation."""
    if "scorecard" in rows[0]:
        return of_scorecards([row["scorecard"] for row in rows])
    if rows[0]["cell"] == BEFORE:
        column = rows[0]["test"]["prompted"]
        return f"prompted {column['accuracy']:.1%}{rates([column])}"
    if "test" not in rows[0]:
        curves = [[f"{v['accuracy']:.1%}" for v in row["validation"]] for row in rows]
        return "; ".join(", ".join(curve) for curve in curves)
    columns = [row["test"]["alone"] for row in rows]
    values = [column["accuracy"] for column in columns]
    spread = f" ({min(values):.1%} – {max(values):.1%})" if len(values) > 1 else ""
    back = fmean(row["test"]["prompted"]["accuracy"] for row in rows)
    return f"{fmean(values):.1%}{spread}{rates(columns)}; prompt given back {back:.1%}"


def of_scorecards(cards: Rows) -> str:
    """What distilled models reached, lost where the prompt is given back, and kept elsewhere."""
    columns = [card["contenders"] for card in cards]
    words = [over_seeds([c["distilled"]["accuracy"] for c in columns])]
    words.append(f"given back {over_seeds([c['distilled_prompted']['accuracy'] for c in columns])}")
    harm = [c["distilled_prompted"].get("harm") for c in columns]
    words.append(f"harm {over_seeds([h and h['mean'] for h in harm])}")
    others = [card["elsewhere"] for card in cards if "elsewhere" in card]
    words.append(f"elsewhere {over_seeds([found['agreement']['mean'] for found in others])}")
    nats = [f"{found['reverse_kl']['mean']:.2f}" for found in others]
    return "; ".join(words) + (f", {', '.join(nats)} nats a token" if nats else "")


def of_rivals(rows: Rows) -> str:
    """A line a rival: means over its seeds, and their range; each seed's interval of accuracy."""
    lines = [
        "| | seeds | accuracy | 95 % intervals | tokens left | elsewhere | harm | train s "
        "| trained on | extra work |",
        f"|{'---|' * 10}",
    ]
    for name in dict.fromkeys(row["rival"] for row in rows):
        found = [row for row in rows if row["rival"] == name]
        shares = (over_seeds([row[what] for row in found]) for what in ("elsewhere", "harm"))
        tokens, seconds, trained = (
            fmean(row[what] for row in found) for what in ("prompt_tokens", "train_s", "tokens")
        )
        accuracy = over_seeds([row["accuracy"] for row in found])
        intervals = ", ".join("{:.1%} – {:.1%}".format(*row["interval_95"]) for row in found)
        cost = [f"{x:.0f}" if trained else "–" for x in (seconds, trained)]
        cells = [name, str(len(found)), accuracy, intervals, f"{tokens:.0f}", *shares, *cost]
        cells.append(found[0]["extra_work"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _rivals(rows: Rows, task: str) -> list[dict[str, Any]]:
    return [rival for row in rows if row["task"] == task for rival in row["rivals"]]


def over_seeds(shares: Sequence[float | None]) -> str:
    """Their mean, and their range where they are several; of none a dash."""
    there = [share for share in shares if share is not None]
    if not there:
        return "–"
    spread = f" ({min(there):.1%} – {max(there):.1%})" if len(there) > 1 else ""
    return f"{fmean(there):.1%}{spread}"


def rates(columns: Rows) -> str:
    """The mean rate of each class, where they are few."""
    if not columns[0]["class_rates"]:
        return ""
    names = columns[0]["class_rates"]
    means = {name: fmean(c["class_rates"][name] for c in columns) for name in names}
    return f" [{', '.join(f'{name} {mean:.0%}' for name, mean in means.items())}]"


def seconds(rows: Rows) -> str:
    """Median time of training, in seconds."""
    return f"{median(row['train_s'] for row in rows):.0f}" if "train_s" in rows[0] else ""


if __name__ == "__main__":
    sys.exit(main())
