"""What a GPU does with all of this, in under eight minutes, as one JSON and one page.

    make gpu-report                          # into build/gpu-report/
    make gpu-report BIN=/path/to/bin         # in the environment of that Python, as it is
    OPCD_COMMIT=0123abc make gpu-report      # where there is no git
    make gpu-report ARGS="--only loss step"  # some parts alone; --save NAME keeps it in results/

The most valuable parts come first. Each is a process of its own with a time limit of its own, and
what one dies of is told with its traceback and takes no other part along; report.json and report.md
are written anew after each. Nothing is fetched. A package that is missing is a gap that has a name.
Without a GPU the parts are smaller, what only a GPU can show is a gap, and the page says so.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from benchmarks.report_page import page

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu-report"
RESULTS = ROOT / "benchmarks" / "results"
TOTAL_S = 470.0
LAST_WORDS_S = 5.0  # that a part has from the first signal to the second
LAST_LINES = 60  # of what a part that failed said

# In the place of the GPU's tests where there is none: the kernels in Triton's interpreter.
STAND_INS = ("tests/opcd_kernels/test_linear_divergence.py", "-m", "not gpu")
STAND_INS += ("-k", "triton and (reverse or digits)")


class Part(NamedTuple):
    """One question of the report."""

    name: str
    question: str
    # Of this Python; {rows} is the file that it writes its rows to, {junit} pytest's report.
    command: tuple[str, ...]
    limit_s: float
    needs: tuple[str, ...] = ()  # modules, without which the part is a gap
    gap: str = ""  # why there is none of it here, whatever is installed


def _pytest(*arguments: str) -> tuple[str, ...]:
    # The project's own options ask for plugins, which need not be there.
    options = ("-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:benchmark", "-q", "-rs")
    return ("-m", "pytest", *options, "--junitxml={junit}", *arguments)


def _bench(file: str, select: str) -> tuple[str, ...]:
    return _pytest(f"benchmarks/{file}.py", "--rows={rows}", "-k", select)


UNCOMPILED = ("ours-triton", "ours-torch", "ours-torch-mixture", "plain-fp32", "plain-bf16")
RUNS = ("pytest", "transformers", "peft", "yaml")  # what the tests and whole runs import
ON_GPU = ("-m", "tests.on_gpu", "--junit", "{junit}")
TUNE = ("-m", "opcd_kernels.tune", "--seconds", "48")  # one more may have begun then
GPU_PARTS = [
    Part("tests", "What only a GPU can show", ON_GPU, 140, RUNS),
    Part(
        "accuracy",
        "How many digits each provider keeps",
        ("-m", "benchmarks.accuracy", "--json", "{rows}", "--kl", "0.04", "0.0005"),
        50,
        ("transformers",),
    ),
    Part(
        "loss",
        "The loss and its gradients against peers",
        _bench("bench_loss", "8192x2048x151936-trained-reverse_kl"),
        100,
        RUNS,
    ),
    Part(
        "teacher",
        "Scoring behind a shared context",
        _bench("bench_prefix", "test_teacher and smollm2-1024-mixed"),
        40,
        RUNS,
    ),
    Part(
        "rollouts",
        "Sampling: the static engine against generate",
        _bench("bench_rollout", "16x128 and not continuous"),
        45,
        RUNS,
    ),
    Part(
        "step",
        "A training step and its phases",
        _bench("bench_step", "smollm2"),
        60,
        RUNS,
    ),
    Part("designs", "Which design and tile is the fastest here", TUNE, 60, ("triton",)),
    Part(
        "timeline",
        "What the device does in a step, and what the host does while it idles",
        ("-m", "benchmarks.profile_step", "--model", "smollm2-135m", "--json", "{rows}"),
        40,
        ("transformers", "peft"),
    ),
]
CPU_PARTS = [
    Part(
        "tests",
        "What only a GPU can show: here the kernels in Triton's interpreter in its place",
        _pytest(*STAND_INS),
        60,
        ("pytest",),
    ),
    GPU_PARTS[1]._replace(
        command=(*GPU_PARTS[1].command[:4], "--kl", "0.04", "--only", *UNCOMPILED), limit_s=90
    ),
    GPU_PARTS[2]._replace(command=_bench("bench_loss", "256x576x49152-trained")),
    GPU_PARTS[3]._replace(
        command=_bench("bench_prefix", "test_teacher and smollm2-256-mixed"), limit_s=70
    ),
    GPU_PARTS[4]._replace(command=_bench("bench_rollout", "8x32 and not continuous"), limit_s=90),
    GPU_PARTS[5]._replace(command=_bench("bench_step", "tiny")),
    GPU_PARTS[6]._replace(gap="a design is chosen on the GPU that is to run it"),
    GPU_PARTS[7]._replace(
        command=("-m", "benchmarks.profile_step", "--model", "qwen2.5-tiny", "--json", "{rows}")
    ),
]
FACTS = Part("machine", "What this was measured on", ("-m", "benchmarks.gpu_facts", "{rows}"), 60)


def has_gpu() -> bool:
    """Asked in a process of its own: a driver that hangs or dies takes this one not along."""
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        return subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def missing(part: Part) -> str:
    """Why the part cannot be asked here, or nothing."""
    if part.gap:
        return part.gap
    if part.command == TUNE and _absent("opcd_kernels.tune"):
        return "opcd_kernels.tune is not in this version"
    absent = [name for name in part.needs if _absent(name)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def _absent(module: str) -> bool:
    return importlib.util.find_spec(module) is None


def run(part: Part, folder: Path, limit_s: float) -> dict[str, Any]:
    """The part's answer; whatever happens in its process, none of it happens here."""
    said, rows, junit = (folder / f"{part.name}.{end}" for end in ("txt", "json", "xml"))
    places = {"{rows}": str(rows), "{junit}": str(junit)}
    command = [sys.executable, *(_filled(word, places) for word in part.command)]
    start = time.monotonic()
    with said.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_environment(part, folder),
        )
        try:
            status: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
    text = said.read_text(encoding="utf-8", errors="replace")
    answer: dict[str, Any] = {
        "state": "timed out" if status is None else "done" if status == 0 else "failed",
        "seconds": round(time.monotonic() - start, 1),
        "limit_s": round(limit_s),
        "rows": _json(rows),
        "failures": [],
        "gaps": [],
    }
    if status != 0:
        last = "\n".join(text.splitlines()[-LAST_LINES:])
        name = f"stopped after {limit_s:.0f} s" if status is None else f"exit status {status}"
        answer["failures"] = [{"name": name, "traceback": last}]
    if junit.exists():
        counts, failures, gaps = read_junit(junit)
        answer |= {"tests": counts, "gaps": gaps}
        answer["failures"] = failures or answer["failures"]
    elif status == 0 and not answer["rows"]:
        answer["output"] = "\n".join(text.splitlines()[-LAST_LINES:])
    return answer


def _filled(word: str, places: dict[str, str]) -> str:
    for name, value in places.items():
        word = word.replace(name, value)
    return word


def _environment(part: Part, folder: Path) -> dict[str, str]:
    """What is tuned here is kept with the report: it must not change what runs use later."""
    return {**os.environ, **({"XDG_CACHE_HOME": str(folder)} if part.command == TUNE else {})}


def _end(process: subprocess.Popen) -> None:
    """It and what it started, where it still runs; first as Ctrl-C does, so that pytest reports."""
    for number in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(LAST_WORDS_S)


def _json(file: Path) -> Any:
    """What a part kept; nothing where it was stopped before or while it wrote."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []


def read_junit(file: Path) -> tuple[dict[str, int], list[dict[str, str]], list[str]]:
    """Of pytest's report: how many passed, failed and were skipped; tracebacks; why skipped."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures, gaps = [], []
    for case in ElementTree.parse(file).iter("testcase"):
        found = {child.tag: child for child in case}
        failed = found.get("failure", found.get("error"))
        if failed is not None:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            failures.append({"name": name, "traceback": failed.text or failed.get("message", "")})
        elif "skipped" in found:
            counts["skipped"] += 1
            gaps.append(f"{case.get('name')}: {found['skipped'].get('message')}")
        else:
            counts["passed"] += 1
    return counts, failures, gaps


def report(
    parts: Sequence[Part],
    folder: Path,
    form: str,
    total_s: float,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Ask one part after the other, as long as there is time; the files after each."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    began = time.monotonic()
    found: dict[str, Any] = {"form": form, "machine": {}, "parts": []}
    for part in parts:
        left = total_s - (time.monotonic() - began)
        answer: dict[str, Any] = {"name": part.name, "question": part.question}
        if gap := missing(part):
            answer |= {"state": "gap", "gaps": [gap]}
        elif left < 1:
            answer |= {"state": "gap", "gaps": [f"no time was left of {total_s:.0f} s"]}
        else:
            tell(f"{part.name}: at most {min(part.limit_s, left):.0f} s")
            answer |= run(part, folder, min(part.limit_s, left))
        if part.name == FACTS.name and answer.get("rows"):
            found["machine"] = answer.pop("rows")
        found["parts"].append(answer)
        found["seconds"] = round(time.monotonic() - began)
        tell(f"{part.name}: {answer['state']}, {found['seconds']} s so far")
        (folder / "report.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (folder / "report.md").write_text(page(found), encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", metavar="PART", help="some parts alone")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where to write")
    parser.add_argument("--save", metavar="NAME", help="keep results/gpu-report-NAME.json, .md")
    args = parser.parse_args()
    gpu = has_gpu()
    parts = GPU_PARTS if gpu else CPU_PARTS
    names = [part.name for part in parts]
    if unknown := set(args.only or []) - set(names):
        parser.error(f"--only must be of {', '.join(names)}, got {', '.join(sorted(unknown))}")
    chosen = [part for part in parts if not args.only or part.name in args.only]
    report([FACTS, *chosen], args.folder, "gpu" if gpu else "cpu, reduced", TOTAL_S)
    for end in ("json", "md"):
        file = args.folder / f"report.{end}"
        if args.save:
            file = Path(shutil.copy(file, RESULTS / f"gpu-report-{args.save}.{end}"))
        print(f"written: {file}")


if __name__ == "__main__":
    main()
