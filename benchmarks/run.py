"""Run every benchmark, each file in a process of its own.

    python -m benchmarks.run [--save NAME] [arguments of pytest]

A file that dies, or that leaves the GPU in an error, takes no other file's rows with it. Exit
status 1 if one failed; what was measured is printed, and kept, all the same.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import summary
from benchmarks.rows import read

HERE = Path(__file__).parent
FOLDER = HERE.parent / ".benchmarks" / "latest"
NOTHING_SELECTED = 5  # pytest's exit status


def measure(arguments: list[str]) -> tuple[list[Path], list[str]]:
    """The run files, and the names of what failed. `arguments` are pytest's."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    commands = {file.stem: _pytest(file, arguments) for file in sorted(HERE.glob("bench_*.py"))}
    if not arguments:
        accuracy = [sys.executable, "-m", "benchmarks.accuracy", "--json", str(_json("accuracy"))]
        commands["accuracy"] = accuracy
    failed, start = [], time.monotonic()
    for name, command in commands.items():
        began = time.monotonic()
        status = subprocess.run(command, cwd=HERE.parent, check=False).returncode
        if status not in (0, NOTHING_SELECTED):
            failed.append(f"{name} (exit status {status})")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"all: {time.monotonic() - start:.0f} s; failed: {', '.join(failed) or 'none'}")
    files = [_json(name) for name in commands]
    return [file for file in files if file.exists() and file.stat().st_size], failed


def _json(name: str) -> Path:
    return FOLDER / f"{name}.json"


def _pytest(file: Path, arguments: list[str]) -> list[str]:
    options = ["-q", "--timeout=900", "-p", "no:cacheprovider", "-p", "no:benchmark"]
    rows = f"--rows={_json(file.stem)}"
    return [sys.executable, "-m", "pytest", str(file), *options, rows, *arguments]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--save", metavar="NAME", help="keep rows and plots")
    known, pytest_arguments = parser.parse_known_args()
    files, failed = measure(pytest_arguments)
    rows = [row for file in files for row in read(file)]
    print(summary.table(rows) if rows else "nothing was measured: see why above")
    if rows and known.save:
        summary.save(rows, known.save)
    sys.exit(1 if failed or not rows else 0)


if __name__ == "__main__":
    main()
