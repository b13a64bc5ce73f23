"""What a distilled prompt saves on a real server: two runs, measured behind a vLLM.

    python -m benchmarks.serving --server_python PYTHON [--folder FOLDER] [--save]

The demo's prompt, and one of some 2,800 tokens: the same with 95 more demonstrations. Both are
trained as the example says, but as an adapter, so that the merged model and the adapter are served
of one run. A run that is there is not trained again, and figures that are there are not measured
again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import opcd
from benchmarks.rows import commit
from opcd.config.settings import gather
from opcd.runtime.files import file_digest, read_jsonl, write_json
from opcd.runtime.strict_json import parse_json
from opcd.terminal import Terminal
from opcd.training.run import train

ROOT = Path(__file__).parent.parent
TASK = ROOT / "examples" / "voice_assistant"
RESULTS = ROOT / "benchmarks" / "results" / "serving-cpu.json"
MORE = 95  # demonstrations: labelled requests, which the long prompt's run does not validate on
SETTINGS: dict[str, Any] = {
    "lora_rank": 16,
    "learning_rate": 1e-3,
    "validate_every": 25,
    "elsewhere_prompts": 0,
    "leak_tokens": 0,
    "divergence_prompts": 8,
}


def demo(folder: Path) -> dict[str, Any]:
    """Settings of a run with the demo's prompt."""
    return {**SETTINGS, "output_dir": str(folder)}


def long(folder: Path) -> dict[str, Any]:
    """Settings of a run with the long prompt, which is written beside it."""
    inputs = folder.with_name(f"{folder.name}-inputs")
    inputs.mkdir(parents=True, exist_ok=True)
    messages = json.loads((TASK / "context.json").read_text("utf-8"))
    for row in read_jsonl(TASK / "validation.jsonl")[:MORE]:
        messages.append({"role": "user", "content": row["prompt"]})
        messages.append({"role": "assistant", "content": row["answer"]})
    write_json(inputs / "context.json", messages)
    return {
        **SETTINGS,
        "output_dir": str(folder),
        "context": str(inputs / "context.json"),
        "validation_data": None,
    }


TASKS = {"demo": demo, "long": long}


def measured(name: str, folder: Path, python: str, minutes: float) -> dict[str, Any]:
    """Train and measure a task, as far as that is not done; its figures."""
    if not (folder / "report.md").is_file():
        with Terminal() as shown:
            outcome = train(gather(TASKS[name](folder), TASK / "config.yaml"), False, shown)
        if outcome.stopped:
            raise KeyboardInterrupt(outcome.stopped)
    file, tree = folder / "serving.json", folder / "commit.txt"
    if not file.is_file():
        opcd.serve_report(folder, server_python=python, max_minutes=minutes)
        tree.write_text(commit(), "utf-8")
    return {"commit": tree.read_text("utf-8").strip(), **parse_json(file.read_bytes())}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--server_python", required=True, help="the interpreter with vLLM")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "serving")
    parser.add_argument("--minutes", type=float, default=3.0, help="of requests, a task")
    parser.add_argument("--save", action="store_true", help=f"keep them as {RESULTS.name}")
    given = parser.parse_args()
    found = {}
    for name in TASKS:
        folder = given.folder / name
        found[name] = measured(name, folder, given.server_python, given.minutes)
        print(f"\n{name}\n")
        for row in found[name]["table"]:
            print("| " + " | ".join(row) + " |")
        print("\n" + "\n".join(f"- {line}" for line in found[name]["summary"]), flush=True)
    agrees = all(x["agrees"] for task in found.values() for x in task["same_answers"].values())
    if given.save:
        files = {"context": TASK / "context.json", "test": TASK / "test.jsonl"}
        digests = {what: file_digest(file) for what, file in files.items()}
        for task in found.values():
            for same in task["same_answers"].values():
                same["differing"] = len(same["differing"])
        write_json(RESULTS, {"task": digests, "tasks": found})
    if not agrees:
        raise SystemExit("a served model is not the measured model: see above")


if __name__ == "__main__":
    main()
