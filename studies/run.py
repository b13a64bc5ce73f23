"""Runs a study: every cell that has no result yet, one run at a time.

    python -m studies.run studies/guided.yaml --stage screen --hours 2

A study is a YAML file of stages; a stage is a grid of tasks, seeds and cells (named settings). What
a run is, the stage says by `measure`:

    validation    trains with `opcd train`; the course of it is all (the default)
    answers       then the model answers the task's test requests, and with the context given back;
                  the cell `before` answers them untrained
    scorecard     then the run's own scorecard, with harm and what is still the same elsewhere
    rivals        `opcd rivals`: a cell is one of them; those of a task and seed share a folder

Its result is one line of `results/STUDY.jsonl`, and its folder is deleted when it ends. Whoever
stops a study loses the run under way alone.
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
MEASURES = ("validation", "answers", "scorecard", "rivals")
# Of a scorecard: figures, and no paths of this machine.
KEPT = (
    *("contenders", "internalised", "internalised_interval_95", "constant", "differences"),
    *("divergence", "prompt_tokens_saved", "elsewhere", "leak", "verdict"),
)
OTHER_CONTEXT = "other_context"  # the rival that learns another task's
SMOKE = 2  # steps
PARTS = ("opcd", "opcd_kernels", "studies", "examples")  # that a run is made of


class Run(NamedTuple):
    """One run of a study."""

    stage: str
    cell: str
    task: str  # a folder of examples/
    seed: int
    model: str
    settings: dict[str, Any]  # beside those of the task's config.yaml
    measure: str
    other: str  # another task of the stage

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells it from the other runs of its study."""
        return self.stage, self.cell, self.task, self.seed

    @property
    def group(self) -> str:
        """What tells its folder from others: rivals need what those before them have left."""
        parts: tuple[object, ...] = self.key
        if self.measure == "rivals":
            rate = self.settings.get("learning_rate")
            parts = ("rivals", self.task, self.seed, *([rate] if rate is not None else []))
        return "-".join(map(str, parts))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--stage", action="append", help="only this one, or these; default: all")
    parser.add_argument("--cell", action="append", help="only this one, or these; default: all")
    parser.add_argument("--task", action="append", help="only this one, or these; default: all")
    parser.add_argument("--hours", type=float, default=float("inf"), help="start no run after that")
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME=FOLDER", help="where a model lies"
    )
    parser.add_argument(
        "--smoke",
        action="store_true",
        help=f"{SMOKE} steps a run, to see that all of it works and what a run takes; first seed, "
        f"results in runs/study/smoke",
    )
    arguments = parser.parse_args()
    folders = dict(pair.split("=", 1) for pair in arguments.model)
    work = ROOT / "runs" / "study" / ("smoke" if arguments.smoke else "")
    begin = time.monotonic()
    kept = (work if arguments.smoke else RESULTS) / f"{arguments.study.stem}.jsonl"
    finished = {key(row) for row in read(kept)} if kept.exists() else set()
    _check_named(arguments.study, arguments.cell or (), arguments.task or ())
    wanted = [*runs(arguments.study, arguments.stage, arguments.cell)]
    if arguments.task:
        wanted = [run for run in wanted if run.task in arguments.task]
    if arguments.smoke:
        wanted = [_shortened(run) for run in wanted if run.seed == wanted[0].seed]
    unfinished = {run.key: run.group for run in runs(arguments.study) if run.key not in finished}
    pending = [run for run in wanted if run.key not in finished]
    for number, run in enumerate(pending, 1):
        if time.monotonic() - begin > arguments.hours * 3600:
            print(f"{len(pending) - number + 1} runs left", flush=True)
            break
        row = carried_out(run, folders, work / run.group)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{number}/{len(pending)} {' '.join(map(str, run.key))}: {line(row)}", flush=True)
        del unfinished[run.key]
        if run.group not in unfinished.values():
            shutil.rmtree(work / run.group)
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
        measure = stage.get("measure", MEASURES[0])
        if measure not in MEASURES:
            raise SystemExit(f"measure must be one of {', '.join(MEASURES)}, got {measure}")
        for seed in stage["seeds"]:
            for task, other in zip(tasks := stage["tasks"], [*tasks[1:], tasks[0]], strict=True):
                for cell, own in stage["cells"].items():
                    if cells and cell not in cells:
                        continue
                    settings = {**stage.get("settings", {}), **(own or {})}
                    model = settings.pop("model", None) or _model_of(task)
                    if cell != BEFORE or seed == stage["seeds"][0]:
                        yield Run(name, cell, task, seed, model, settings, measure, other)


def _check_named(study: Path, cells: Sequence[str], tasks: Sequence[str]) -> None:
    """End with a word for cells and tasks that no stage has: else nothing would run."""
    every = [*runs(study)]
    for name, given, known in (
        ("cell", cells, {run.cell for run in every}),
        ("task", tasks, {run.task for run in every}),
    ):
        if unknown := set(given) - known:
            raise SystemExit(
                f"--{name} must be one of {', '.join(sorted(known))}, got "
                f"{', '.join(sorted(unknown))}"
            )


def read(kept: Path) -> list[dict[str, Any]]:
    """The rows of a results file."""
    return [json.loads(row) for row in kept.read_text(encoding="utf-8").splitlines()]


def key(row: dict[str, Any]) -> tuple[str, str, str, int]:
    """The key of the run that a row came from."""
    return row["stage"], row["cell"], row["task"], row["seed"]


def carried_out(run: Run, folders: dict[str, str], folder: Path) -> dict[str, Any]:
    """Train and measure; what is needed to check a claim."""
    if run.measure != "rivals":
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    row: dict[str, Any] = {
        **{name: getattr(run, name) for name in ("stage", "cell", "task", "seed", "model")},
        "settings": run.settings,
        "commit": commit(),
        "device": device(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    base = folders.get(run.model, run.model)
    if base != run.model:
        row["weights"] = Path(base).name  # of a folder in its place
    found = _as_rival if run.measure == "rivals" else _as_run
    return row | found(run, base, folder)


def _as_run(run: Run, base: str, folder: Path) -> dict[str, Any]:
    row: dict[str, Any] = {}
    answers, trained = base, folder / "run"
    if run.cell != BEFORE:
        given: dict[str, Any] = {}
        if run.measure != "scorecard":  # `studies.answers` measures, or nothing does
            given = {"test_data": None, "elsewhere_prompts": 0}
        row["train_s"] = timed(_command("train", run, base, trained, given), folder)
        row |= measured(trained / "metrics.jsonl")
        selection = trained / "final" / "selection.json"
        row["selected"] = json.loads(selection.read_text(encoding="utf-8"))["step"]
        answers = str(trained / "final")
    if run.measure == "scorecard":
        card = json.loads((trained / "scorecard.json").read_text(encoding="utf-8"))
        row["scorecard"] = {name: card[name] for name in KEPT if name in card}
    if run.measure == "answers":
        command = ["studies.answers", f"examples/{run.task}/config.yaml", base, answers]
        row["answer_s"] = timed([*command, str(folder / "reached.json")], folder)
        row["test"] = json.loads((folder / "reached.json").read_text(encoding="utf-8"))
    return row


def _as_rival(run: Run, base: str, folder: Path) -> dict[str, Any]:
    """A rival's row; the first one's brings those of the model before."""
    command = [*_command("rivals", run, base, folder / "run", {}), "--rival", run.cell]
    if run.cell == OTHER_CONTEXT:
        command += ["--other_context", f"examples/{run.other}/context.json"]
    seconds = timed(command, folder)
    own = ("base", "prompted", "opcd") if run.cell == "opcd" else (run.cell,)
    rows = read(folder / "run" / "rivals" / "rivals.jsonl")
    return {"seconds": seconds, "rivals": [row for row in rows if row["rival"] in own]}


def _command(name: str, run: Run, base: str, output_dir: Path, given: dict[str, Any]) -> list[str]:
    command = ["opcd.cli", name, "--config", f"examples/{run.task}/config.yaml"]
    given = {"output_dir": output_dir, "model": base, "seed": run.seed, **given, **run.settings}
    for field, value in given.items():
        command += [f"--{field}", "null" if value is None else str(value)]
    return command


def _shortened(run: Run) -> Run:
    return run._replace(settings=run.settings | {"steps": SMOKE})


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
    if card := row.get("scorecard"):
        words += [f"{who} {of['accuracy']:.1%}" for who, of in card["contenders"].items()]
    for rival in row.get("rivals", ()):
        words.append(f"{rival['rival']} {rival['accuracy']:.1%}, {row['seconds']:.0f} s")
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


def commit() -> str:
    """What was checked out, with a mark where what a run is made of differs from it."""
    found = output("git", "describe", "--always", "--exclude=*")
    changed = output("git", "status", "--porcelain", "--", *PARTS, ":!studies/results")
    return f"{found}-dirty" if changed else found


def output(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
