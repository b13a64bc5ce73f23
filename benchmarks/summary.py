"""What a benchmark run found, for people: a table; and results that stay.

python -m benchmarks.summary RUN.json...                # prints the table
python -m benchmarks.summary RUN.json... --save NAME    # keeps results/QUESTION-NAME.json
python -m benchmarks.summary --plots                    # draws what results/ holds into docs/
"""

import argparse

from benchmarks.plots import draw_results
from benchmarks.rows import RESULTS, Row, cases, facts, provider, rows_of, write


def table(rows: list[Row]) -> str:
    """A block a problem: providers down, the median and the other facts across."""
    lines = []
    for place, here in _places(rows):
        lines += ["", place]
        for (question, name), group in cases(here):
            columns = [k for k in _keys(group) if any(row.get(k) is not None for row in group)]
            cells = [columns, *([_cell(row.get(k)) for k in columns] for row in group)]
            widths = [max(9, *map(len, column)) for column in zip(*cells, strict=True)]
            lines += ["", f"{question}: {name}"]
            for first, line in zip(["", *map(provider, group)], cells, strict=True):
                padded = (f"{c:>{width}}" for c, width in zip(line, widths, strict=True))
                lines.append("  ".join([f"{first:18}", *padded]))
    return "\n".join(lines[1:])


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else f"{value:.4g}"


def _places(rows: list[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by what a heading says of where and when they were measured."""
    places: dict[str, list[Row]] = {}
    for row in rows:
        heading = ", ".join(str(row[k]) for k in ("device", "commit", "date") if k in row)
        places.setdefault(heading, []).append(row)
    return list(places.items())


def _keys(group: list[Row]) -> dict[str, None]:
    return dict.fromkeys(["median_s", *(k for row in group for k in facts(row))])


def save(rows: list[Row], name: str) -> None:
    """Replace results/QUESTION-NAME.json, and its plot, of the questions that `rows` answer."""
    files = []
    for question in dict.fromkeys(row["question"] for row in rows):
        files.append(RESULTS / f"{question}-{name}.json")
        write((row for row in rows if row["question"] == question), files[-1])
    for file in files + draw_results(files):
        print(f"written: {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=rows_of, nargs="*", help="the rows of a run")
    parser.add_argument("--save", metavar="NAME", help="keep rows and plots")
    parser.add_argument("--plots", action="store_true", help="draw every stored result again")
    arguments = parser.parse_args()
    if arguments.plots:
        print(*draw_results(sorted(RESULTS.glob("*.json"))), sep="\n")
        return
    rows = [row for rows in arguments.runs for row in rows]
    if not rows:
        parser.exit(1, "nothing was measured: give the rows of a run that measured something\n")
    print(table(rows))
    if arguments.save:
        save(rows, arguments.save)


if __name__ == "__main__":
    main()
