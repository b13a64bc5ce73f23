"""The tests that need a GPU, a process a file: a fault on it takes no other file along.

    python -m tests.on_gpu                    # what pytest says, and 1 where something failed
    python -m tests.on_gpu --junit FILE       # and a report, written anew after each file

What only a GPU can show comes first. A file that cannot be read for want of a package fails alone.
"""

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

FIRST = (
    "tests/opcd_kernels/test_gpu.py",
    "tests/opcd_kernels/test_prefix_attention.py",
    "tests/opcd/passes/test_backends.py",
    "tests/opcd/rollouts/test_static.py",
)
# The project's own options ask for plugins, which need not be there.
PYTEST = ("-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "-rsE")
SOME_CANNOT_BE_READ, NOTHING_CHOSEN = 1, 5  # pytest's exit status
LAST_WORDS_S = 4.0  # of a file, after Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tests", nargs="*", default=["tests"], help="files and folders")
    parser.add_argument("--junit", type=Path, metavar="FILE", help="report as JUnit's XML")
    arguments = parser.parse_args(argv)
    suites, failed = ElementTree.Element("testsuites"), []
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder) / "one.xml"
        try:
            found = files(arguments.tests)
        except RuntimeError as error:
            print(error)
            return 1
        for file in found:
            print(f"\n{file}", flush=True)
            one.unlink(missing_ok=True)
            status = run(file, one)
            if status not in (0, NOTHING_CHOSEN):
                failed.append(file)
            if one.exists():
                suites.extend(ElementTree.parse(one).iter("testsuite"))
            if arguments.junit is not None:
                ElementTree.ElementTree(suites).write(arguments.junit)
            if status is None:
                break
    print(f"\nfailed: {', '.join(failed)}" if failed else "\nall passed")
    return 1 if failed else 0


def files(wanted: Sequence[str]) -> list[str]:
    """Those with tests that need a GPU, and those that cannot be read.

    Raises RuntimeError where pytest itself does not run.
    """
    command = [sys.executable, *PYTEST, "-m", "gpu", "--collect-only", *wanted]
    command.append("--continue-on-collection-errors")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout
    if done.returncode not in (0, SOME_CANNOT_BE_READ, NOTHING_CHOSEN) or not said.strip():
        raise RuntimeError(f"{said}{done.stderr}\nno test could be looked for: pytest does not run")
    found = {line.split("::")[0] for line in said.splitlines() if "::" in line}
    found |= {line.split()[1] for line in said.splitlines() if line.startswith("ERROR ")}
    return sorted(found, key=lambda name: (*(name != first for first in FIRST), name))


def run(file: str, junit: Path) -> int | None:
    """pytest's exit status; None where Ctrl-C ended it, which lets it report."""
    command = [sys.executable, *PYTEST, "-m", "gpu", f"--junitxml={junit}", file]
    process = subprocess.Popen(command)
    try:
        return process.wait()
    except KeyboardInterrupt:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(LAST_WORDS_S)
        process.kill()
        return None


if __name__ == "__main__":
    sys.exit(main())
