"""What a model answers to a task's test requests, without and with the context."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from opcd.config import TrainConfig
from opcd.evaluation.contenders import Contender, Subjects
from opcd.evaluation.scorecard import scorecard
from opcd.tasks.prepare import prepare

FEW_CLASSES = 10  # up to here the rate of each class is kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path, help="of the task")
    parser.add_argument("base", help="the model before training")
    parser.add_argument("model", help="the model that answers: the same, or one trained from it")
    parser.add_argument("out", type=Path, help="JSON file for what it reached")
    arguments = parser.parse_args()
    config = yaml.safe_load(arguments.config.read_text(encoding="utf-8"))
    found = reached(TrainConfig(**{**config, "model": arguments.base}), arguments.model)
    arguments.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


def reached(config: TrainConfig, model: str) -> dict[str, Any]:
    """The columns `alone` and `prompted` of a scorecard, and the rate of each class."""
    setup = prepare(config)
    subjects = Subjects(setup)
    subject, cases = subjects.get(model), setup.task.test
    contenders = [
        Contender("alone", "without the context", subject.alone),
        Contender("prompted", "with the context", subject.prompted),
    ]
    answers = {c.name: c.answer(cases) for c in contenders}
    columns, rows = scorecard(contenders, answers, cases, setup.task.scorer)
    for name, column in columns.items():
        del column["meaning"]
        column["class_rates"] = class_rates(rows, name)
    return columns


def class_rates(rows: Sequence[dict[str, Any]], contender: str) -> dict[str, float] | None:
    """Share of right answers of each class; None where classes are many."""
    by_class = defaultdict(list)
    for row in rows:
        by_class[row["accepted"][0]].append(row[f"{contender}_right"])
    if len(by_class) > FEW_CLASSES:
        return None
    return {name: fmean(right) for name, right in sorted(by_class.items())}


if __name__ == "__main__":
    sys.exit(main())
