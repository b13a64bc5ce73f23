"""What a run needs, predicted before its weights are read, beside what it then took.

    python -m benchmarks.budget                     # SmolLM2 alone
    python -m benchmarks.budget --model FOLDER      # that model too: every weight, and LoRA

The task is examples/voice_assistant; a few steps with one validation, a checkpoint, the export and
the scorecard. Each prediction and each run has a process of its own. Memory is the largest resident
set of the run's process, disk the most that output_dir held (looked at 20 times a second), time
that from the first step to the end of the scorecard.
"""

import argparse
import contextlib
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.rows import RESULTS, Row, origin, write
from opcd.config import TrainConfig
from opcd.config.settings import gather
from opcd.preflight.budget import Needs, budget
from opcd.runtime.files import folder_bytes
from opcd.runtime.progress import Progress
from opcd.tasks.prepare import prepare
from opcd.training import duration
from opcd.training.build import build_distiller
from opcd.training.run import train

EXAMPLE = Path(__file__).parent.parent / "examples" / "voice_assistant" / "config.yaml"
STEPS = {"steps": 6, "validate_every": 3, "save_every": 3}


class Timed(Progress):
    """From the first step to the end of the scorecard."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.ended = 0.0

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.begun = self.begun or time.perf_counter()

    def end(self) -> None:
        self.ended = time.perf_counter()


def predicted(config: TrainConfig) -> dict[str, Any]:
    needs = budget(prepare(config, for_training=True)).needs
    assert isinstance(needs, Needs), needs
    return {
        "parts": needs.memory.parts,
        "phases": needs.memory.phases,
        "memory": needs.memory.peak,
        "disk": needs.disk.peak,
        "disk_end": needs.disk.end,
    }


def timed(config: TrainConfig) -> dict[str, Any]:
    setup = prepare(config, for_training=True)
    one = duration.timed(build_distiller(setup), setup)
    return {"one": one._asdict(), "run": duration.run_seconds(one, setup)._asdict()}


def ran(config: TrainConfig) -> dict[str, Any]:
    folder, progress, ended = Path(config.output_dir), Timed(), threading.Event()
    most = [0]

    def watch() -> None:
        while not ended.wait(0.05):
            with contextlib.suppress(OSError):  # a file that has just gone
                most[0] = max(most[0], folder_bytes(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        train(config, progress=progress)
    finally:
        ended.set()
        watcher.join()
    assert progress.begun is not None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {
        "memory": peak,
        "disk": most[0],
        "disk_end": folder_bytes(folder),
        "seconds": progress.ended - progress.begun,
        "steps_s": sum(row.get("step_time_s", 0.0) for row in rows),
    }


PARTS: dict[str, Callable[[TrainConfig], dict[str, Any]]] = {
    part.__name__: part for part in (predicted, timed, ran)
}


def alone(part: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The part in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.budget", "--part", part]
    with tempfile.TemporaryDirectory() as folder:
        given = json.dumps(settings | {"output_dir": f"{folder}/run"})
        done = subprocess.run([*command, "--settings", given], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(settings: dict[str, Any]) -> Row:
    found = {part: alone(part, settings) for part in PARTS}
    before, during, after = (found[part] for part in PARTS)
    seconds = sum(during["run"].values())
    return {
        "question": "budget",
        "model": Path(settings["model"]).name,
        "training": f"LoRA rank {settings['lora_rank']}" if "lora_rank" in settings else "all",
        "memory_predicted_mib": round(before["memory"] / 2**20),
        "memory_mib": round(after["memory"] / 2**20),
        "memory_error": round(before["memory"] / after["memory"] - 1, 3),
        "disk_predicted_mib": round(before["disk"] / 2**20),
        "disk_mib": round(after["disk"] / 2**20),
        "disk_error": round(before["disk"] / after["disk"] - 1, 3),
        "disk_end_error": round(before["disk_end"] / after["disk_end"] - 1, 3),
        "predicted_s": round(seconds, 1),
        "run_s": round(after["seconds"], 1),
        "time_error": round(seconds / after["seconds"] - 1, 3),
        "steps_s": round(after["steps_s"], 1),
        **{f"{k}_mib": round(v / 2**20) for k, v in before["parts"].items()},
        **{f"in_{k}_mib": round(v / 2**20) for k, v in before["phases"].items()},
        **{f"{k}_predicted_s": round(v, 1) for k, v in during["run"].items()},
        **{f"one_{k}_s": round(v, 3) for k, v in during["one"].items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder of another model")
    parser.add_argument("--save", default="cpu", metavar="NAME", help="results/budget-NAME.json")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        print(json.dumps(PARTS[args.part](gather(args.settings, EXAMPLE))))
        return
    cells: list[dict[str, Any]] = [{"model": "smollm2-135m-instruct"}]
    if args.model:
        cells += [{"model": args.model}, {"model": args.model, "lora_rank": 16}]
    rows = []
    for cell in cells:
        rows.append(origin() | measured(cell | STEPS))
        print(json.dumps(rows[-1], indent=1), flush=True)
    write(rows, RESULTS / f"budget-{args.save}.json")


if __name__ == "__main__":
    main()
