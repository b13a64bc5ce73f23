"""Every answer behind a scorecard in one table: a contender's answer to a request a line."""

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd.runtime.files import write_text
from opcd.tasks.messages import asked

FILE = "answers.csv"
COLUMNS = (
    *("data", "row", "kind", "context", "contender", "prompt", "accepted", "answer"),
    *("right", "reverse_kl"),
)


def write_table(
    folder: Path,
    contenders: Sequence[str],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],  # by the name of the data
    elsewhere: Sequence[Mapping[str, Any]],
) -> None:
    """Write answers.csv: UTF-8, with a first line of names, as spreadsheets and pandas read it."""
    text = io.StringIO()
    # All texts in quotes: Python before 3.13 leaves a carriage return, which ends a line, bare.
    writer = csv.DictWriter(
        text, COLUMNS, restval="", lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC
    )
    writer.writeheader()
    writer.writerows(_judged(contenders, answers))
    writer.writerows(_elsewhere(elsewhere))
    write_text(folder / FILE, text.getvalue())


def _judged(
    contenders: Sequence[str], answers: Mapping[str, Sequence[Mapping[str, Any]]]
) -> Iterator[dict[str, Any]]:
    for data, rows in answers.items():
        for number, row in enumerate(rows, 1):
            for name in contenders:
                yield {
                    **_request(data, number, row),
                    "contender": name,
                    "accepted": " | ".join(row.get("accepted", ())),
                    "answer": row[name],
                    "right": "" if f"{name}_right" not in row else float(row[f"{name}_right"]),
                }


def _elsewhere(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    for number, row in enumerate(rows, 1):
        for name in ("original", "distilled"):
            yield {
                **_request("elsewhere", number, row),
                "contender": name,
                "answer": row[name],
                "reverse_kl": row["reverse_kl"] if name == "distilled" else "",
            }


def _request(data: str, number: int, row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "data": data,
        "row": number,
        "kind": row.get("kind", ""),
        "context": row.get("context", ""),
        "prompt": asked(row["prompt"]),
    }
