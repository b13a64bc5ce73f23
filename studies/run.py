"""Runs a study: every cell that has no result yet, one run at a time.

    python -m studies.run studies/guided.yaml --stage screen --hours 2

A study is a YAML file of stages; a stage is a grid of tasks, seeds and cells (named settings). A
run trains with `opcd train`, then the model answers the task's test requests if the stage says
`test`; the cell `before` answers them untrained. Its result is one line of `results/STUDY.jsonl`,
and its folder is deleted when it ends. Whoever stops a study loses the run under way alone.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import yaml

from opcd.config.settings import gather

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
BEFORE = "before"  # the cell of a model as it is


class Run(NamedTuple):
    """One run of a study."""

    stage: str
    cell: str
    task: str  # a folder of examples/
    seed: int
    model: str
    settings: dict[str, Any]  # beside those of the task's config.yaml
    test: bool

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells it from the other runs of its study."""
        return self.stage, self.cell, self.task, self.seed


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--stage", action="append", help="only this one, or these; default: all")
    parser.add_argument("--cell", action="append", help="only this one, or these; default: all")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no run after that")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="where a model lies"
    )
    arguments = parser.parse_args()
    folders = dict(pair.split("=", 1) for pair in arguments.model)
    begin, kept = time.monotonic(), RESULTS / f"{arguments.study.stem}.jsonl"
    finished = {key(row) for row in read(kept)} if kept.exists() else set()
    pending = [
        run
        for run in runs(arguments.study, arguments.stage, arguments.cell)
        if run.key not in finished
    ]
    for number, run in enumerate(pending, 1):
        if time.monotonic() - begin > arguments.hours * 3600:
            print(f"{len(pending) - number + 1} runs left", flush=True)
            break
        row = carried_out(run, folders)
        kept.parent.mkdir(exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(pending)} {' '.join(map(str, run.key))}: {line(row)}", flush=True)
    return 0


def runs(
    study: Path, stages: Sequence[str] | None = None, cells: Sequence[str] | None = None
) -> Iterator[Run]:
    """The runs of a study, in the order of its file."""
    found = yaml.safe_load(study.read_text(encoding="utf-8"))["stages"]
    if unknown := set(stages or ()) - set(found):
        raise SystemExit(f"--stage must be one of {', '.join(found)}, got {', '.join(unknown)}")
    for name, stage in found.items():
        if stages and name not in stages:
            continue
        for seed in stage["seeds"]:
            for task in stage["tasks"]:
                for cell, own in stage["cells"].items():
                    if cells and cell not in cells:
                        continue
                    settings = {**stage.get("settings", {}), **(own or {})}
                    model = settings.pop("model", None) or _model_of(task)
                    if cell != BEFORE or seed == stage["seeds"][0]:
                        yield Run(name, cell, task, seed, model, settings, stage.get("test", False))


def read(kept: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(row) for row in kept.read_text(encoding="utf-8").splitlines()]


def key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """The key of the run that a row came from."""
    return row["stage"], row["cell"], row["task"], row["seed"]


def carried_out(run: Run, folders: dict[str, str]) -> dict[str, Any]:
    """Train and answer; what is needed to check a claim."""
    folder = ROOT / "runs" / "study" / "-".join(map(str, run.key))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base = folders.get(run.model, run.model)
    row: dict[str, Any] = {
        **{name: getattr(run, name) for name in ("stage", "cell", "task", "seed", "model")},
        "settings": run.settings,
        "commit": output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "device": device(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    answers = base
    if run.cell != BEFORE:
        command = ["opcd.cli", "train", "--config", f"examples/{run.task}/config.yaml"]
        given = {"output_dir": folder / "run", "model": base, "seed": run.seed}
        given |= {"test_data": None, "elsewhere_prompts": 0}  # `studies.answers` measures
        for name, value in {**given, **run.settings}.items():
            command += [f"--{name}", "null" if value is None else str(value)]
        row["train_s"] = timed(command, folder)
        row |= measured(folder / "run" / "metrics.jsonl")
        answers = str(folder / "run" / "final")
    if run.test:
        command = ["studies.answers", f"examples/{run.task}/config.yaml", base, answers]
        row["answer_s"] = timed([*command, str(folder / "reached.json")], folder)
        row["test"] = json.loads((folder / "reached.json").read_text(encoding="utf-8"))
    shutil.rmtree(folder)
    return row


def timed(command: Sequence[str], folder: Path) -> float:
    """Run a module in a process of its own; returns seconds, or ends the study with its words."""
    begin, log = time.monotonic(), folder / "log"
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=ROOT, stdout=file, stderr=file, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{log.read_text(encoding='utf-8')[-3000:]}")
    return round(time.monotonic() - begin, 1)


def measured(metrics: Path) -> dict[str, Any]:
    """The course of a run."""
    steps = [row for row in read(metrics) if "step_time_s" in row]
    found = [{"step": row["step"], **row["validation"]} for row in steps if row.get("validation")]
    return {
        "validation": found,
        "loss": {name: [row.get(name) for row in steps] for name in ("divergence", "guided_loss")},
        "step_time_s": fmean(row["step_time_s"] for row in steps),
    }


def line(row: dict[str, Any]) -> str:
    """A result in a line."""
    words = [f"{row['train_s']:.0f} s"] if "train_s" in row else []
    words += [f"{found['accuracy']:.1%}" for found in row.get("validation", ())]
    for name, column in row.get("test", {}).items():
        words.append(f"test {name} {column['accuracy']:.1%} {column['class_rates'] or ''}")
    return ", ".join(words)


def device() -> str:
    """The processor, and how many of its cores may be used."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text(encoding="utf-8").splitlines() if cpu.exists() else []
    names = {text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")}
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{' '.join(sorted(names)) or platform.processor()}, {usable} cores"


def _model_of(task: str) -> str:
    return gather({}, ROOT / "examples" / task / "config.yaml").model


def output(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
