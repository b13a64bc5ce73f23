"""What a model answers to a task's test requests, without and with the context."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.evaluation.contenders import Models, both_contenders
from opcd.evaluation.scorecard import scorecard
from opcd.tasks.prepare import prepare


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config", type=Path, help="of the task")
    parser.add_argument("base", help="the model before training")
    parser.add_argument("model", help="the model that answers: the same, or one trained from it")
    parser.add_argument("out", type=Path, help="JSON file for what it reached")
    arguments = parser.parse_args()
    config = gather({"model": arguments.base}, arguments.config)
    found = reached(config, arguments.model)
    arguments.out.write_text(json.dumps(found), encoding="utf-8")
    return 0


def reached(config: TrainConfig, model: str) -> dict[str, Any]:
    """The columns `alone` and `prompted` of a scorecard, and the rate of each class."""
    setup = prepare(config)
    cases = setup.task.test
    contenders = both_contenders(Models(setup), model, "now", ("alone", "prompted"))
    answers = {c.name: c.answer(cases) for c in contenders}
    # The tasks are judged by their answers: what the teacher says is not asked for again.
    columns, _ = scorecard(contenders, answers, answers["prompted"], cases, setup.task.scorer)
    for column in columns.values():
        del column["meaning"], column["greedy_agreement"]
        rates = column.pop("rates", {})
        column["class_rates"] = {name: rate["mean"] for name, rate in rates.items()} or None
    return columns


if __name__ == "__main__":
    sys.exit(main())
