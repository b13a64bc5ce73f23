"""Trains the four examples as if nobody knew an answer, and scores them with the answers.

    python -m studies.unlabelled

Validation chooses the checkpoint by the gap and the scorecard counts agreement, as they do where
there are no answers; then the test requests are judged by theirs. A result is a line of
`results/unlabelled.jsonl`; what is there is not done again.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from studies.run import RESULTS, ROOT, commit, device, read, timed
from studies.verdicts import EXAMPLES

KEPT = RESULTS / "unlabelled.jsonl"
DATA = {"prompts": "train", "validation_data": "validation", "test_data": "test"}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", action="append", choices=EXAMPLES, help="default: all")
    for task in parser.parse_args().task or EXAMPLES:
        if KEPT.exists() and task in {row["task"] for row in read(KEPT)}:
            continue
        row = carried_out(task)
        with KEPT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        word, reached = row["verdict"]["word"], row["test"]
        rates = ", ".join(f"{name} {column['accuracy']:.1%}" for name, column in reached.items())
        print(f"{task}: {word}, {rates}, {row['train_s']:.0f} s", flush=True)
    return 0


def carried_out(task: str) -> dict[str, Any]:
    """Train without answers, then judge by them."""
    folder = ROOT / "runs" / "unlabelled" / task
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    example = ROOT / "examples" / task
    given = {"output_dir": folder / "run", "scorer": "exact", "elsewhere_prompts": 0}
    given |= {"leak_tokens": 0, "save_every": 1000}
    for name, part in DATA.items():
        given[name] = _without_answers(example / f"{part}.jsonl", folder)
    config = str(example / "config.yaml")
    command = ["opcd", "train", "--config", config]
    for name, value in given.items():
        command += [f"--{name}", str(value)]
    seconds = timed(command, folder)
    run, reached = folder / "run", folder / "reached.json"
    model = json.loads((run / "scorecard.json").read_text(encoding="utf-8"))["model"]
    timed(["studies.answers", config, model, str(run / "final"), str(reached)], folder)
    card = json.loads((run / "scorecard.json").read_text(encoding="utf-8").replace(f"{ROOT}/", ""))
    steps = read(run / "metrics.jsonl")
    row = {
        "task": task,
        "train_s": seconds,
        "verdict": card["verdict"],
        "selection": card["selection"],
        "differences": card["differences"],
        "agreement": {
            name: column["greedy_agreement"] for name, column in card["contenders"].items()
        },
        "gap": {
            name: column["gap"] for name, column in card["contenders"].items() if "gap" in column
        },
        "alarms": [name for step in steps for name in step.get("alarms", ())],
        "test": json.loads(reached.read_text(encoding="utf-8")),
        "commit": commit(),
        "device": device(),
    }
    shutil.rmtree(folder)
    return row


def _without_answers(file: Path, folder: Path) -> Path:
    """A copy of a data file that has prompts alone."""
    stripped = folder / file.name
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    kept = ({k: v for k, v in row.items() if k not in ("answer", "answers")} for row in rows)
    stripped.write_text("".join(f"{json.dumps(row)}\n" for row in kept), encoding="utf-8")
    return stripped


if __name__ == "__main__":
    sys.exit(main())
