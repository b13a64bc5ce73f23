"""Turns measurements of the loss into the table from which `backend="auto"` chooses.

    python -m benchmarks.designs benchmarks/results/loss-NAME.json

Rows of `opcd_kernels/measured_designs.json` for the same device and shape are replaced.
"""

import argparse
import json
from pathlib import Path

from benchmarks.rows import Row, rows_of, write
from opcd_kernels import backends

TABLE = Path(backends.__file__).with_name("measured_designs.json")
PROVIDERS = {f"ours-{design.replace('_', '-')}": design for design in backends.DESIGNS}
CASE = ("device", "D", "V", "head")
Rows = list[Row]


def designs(rows: Rows) -> Rows:
    """One row a device and shape where every design was measured: the fewest tokens, which is
    nearest to a training step."""
    found: dict[tuple, dict] = {}
    timed = [row for row in rows if row.get("provider") in PROVIDERS and "median_s" in row]
    for row in sorted(timed, key=lambda row: row["N"]):
        key = tuple(row[k] for k in CASE)
        kept = found.setdefault(key, {k: row[k] for k in (*CASE, "N", "commit", "date")})
        if kept["N"] == row["N"]:
            kept.setdefault("seconds", {})[PROVIDERS[row["provider"]]] = row["median_s"]
    return [row for row in found.values() if len(row["seconds"]) == len(PROVIDERS)]


def merged(table: Rows, new: Rows) -> Rows:
    """`table` with what was measured anew replaced."""
    cases = [tuple(row[k] for k in CASE) for row in new]
    return [row for row in table if tuple(row[k] for k in CASE) not in cases] + new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=rows_of, help="rows that make bench SAVE=NAME kept")
    arguments = parser.parse_args()
    new = designs(arguments.results)
    if not new:
        parser.exit(1, f"no shape has a row of each of {', '.join(PROVIDERS)}\n")
    table = merged(json.loads(TABLE.read_text(encoding="utf-8")), new)
    write(table, TABLE)
    for row in new:
        winner = min(row["seconds"], key=row["seconds"].__getitem__)
        print(*(row[k] for k in CASE), row["seconds"], winner, sep="  ")


if __name__ == "__main__":
    main()
