"""Holds what `opcd check` says of a prompt against what training then gives.

    python -m studies.verdicts check     before any training
    python -m studies.verdicts train     the same, as they are configured

The prompts are the four examples and those of `studies/prompts`: four that are trained, and three
that a check alone is asked about, since nobody would train them. A verdict is a line of
`results/verdicts.jsonl`, and so is an outcome; what is there is not done again, and nothing is
trained before all are checked.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from studies.run import RESULTS, ROOT, commit, device, read

KEPT = RESULTS / "verdicts.jsonl"
EXAMPLES = ("voice_assistant", "safety", "policy", "structured_output")
BAD_INPUT = 2  # the status of a command
SMALL = ("meeting_or_task", "signature", "polite", "reverse")
UNTRAINED = ("nothing", "dropped", "too_large")
TASKS = {name: ROOT / "examples" / name for name in EXAMPLES} | {
    name: ROOT / "studies" / "prompts" / name for name in (*SMALL, *UNTRAINED)
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("check", "train"))
    parser.add_argument("--task", action="append", choices=TASKS, help="default: all")
    parser.add_argument("--model", help="in place of the one that is configured")
    arguments = parser.parse_args()
    asked = arguments.model and Path(arguments.model).name
    trained = arguments.part == "train"
    tasks = arguments.task or [name for name in TASKS if not (trained and name in UNTRAINED)]
    for task in tasks:
        found = read(KEPT) if KEPT.exists() else []
        done = {(row["part"], row["task"]) for row in found if row["asked"] == asked}
        unchecked = [t for t in tasks if ("check", t) not in done]
        if trained and unchecked:
            raise SystemExit(f"check first: {', '.join(unchecked)}")
        if (arguments.part, task) in done:
            continue
        row = carried_out(arguments.part, task, arguments.model)
        with KEPT.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        word = row["found"]["verdict"]["word"]
        print(f"{task}: {word}, {row['seconds']:.0f} s", flush=True)
    return 0


def carried_out(part: str, task: str, model: str | None) -> dict[str, Any]:
    """What the command printed as JSON, and how long it took."""
    folder = ROOT / "runs" / "verdicts" / task
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "opcd", part, "--config", str(TASKS[task] / "config.yaml")]
    command += ["--json", "--output_dir", str(folder), "--elsewhere_prompts", "0"]
    command += ["--model", model] if model else []
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    said = done.stdout or _refused(done)  # a check that says no has a status of its own
    for path in (ROOT, Path.home()):  # no paths of this machine
        said = said.replace(f"{path}/", "")
    found = json.loads(said)
    shutil.rmtree(folder, ignore_errors=True)
    return {
        "part": part,
        "task": task,
        "asked": model and Path(model).name,
        "found": found,
        "seconds": round(time.monotonic() - begin, 1),
        "commit": commit(),
        "device": device(),
    }


def _refused(done: subprocess.CompletedProcess[str]) -> str:
    """What is refused before there is anything to measure, as a verdict. Raises SystemExit for
    whatever else the command has ended by."""
    last = done.stderr.strip().splitlines()[-1:]
    if done.returncode != BAD_INPUT or not last:
        raise SystemExit(f"{done.stderr}\nended with status {done.returncode}")
    reason = last[0].partition(": ")[2]
    return json.dumps({"verdict": {"word": "refused", "reason": reason}})


if __name__ == "__main__":
    sys.exit(main())
