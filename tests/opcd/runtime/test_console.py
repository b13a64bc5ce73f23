"""Output on terminals of other encodings, and without a reader."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opcd.runtime.console import any_console
from tests.conftest import in_groups


@pytest.mark.parametrize(
    ("encoding", "expected"),
    [
        ("utf-8", "✓ 3 → 4 – 日…"),
        ("cp1252", "+ 3 -> 4 – \\u65e5…"),
        ("ascii", "+ 3 -> 4 - \\u65e5..."),
    ],
)
def test_signs_that_cannot_be_encoded_are_spelled(
    monkeypatch: pytest.MonkeyPatch, encoding: str, expected: str
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    with any_console():
        print("✓ 3 → 4 – 日…", end="", flush=True)
    assert raw.getvalue().decode(encoding) == expected


def test_a_reader_that_has_gone_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    stream = os.fdopen(writing, "w", encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with any_console():
        print("heard", flush=True)
        os.close(reading)
        print("not heard", flush=True)
        print("nor this", flush=True)
    assert sys.stdout is stream
    stream.close()  # what is left goes nowhere


def test_a_reader_that_has_gone_is_no_exit_status() -> None:
    """Of output that is never flushed: the interpreter would find out as it ends, and exit 120."""
    script = (
        "import sys, time\n"
        "from opcd.runtime.console import any_console\n"
        "with any_console():\n"
        "    sys.stdin.readline()\n"
        "    print('short')\n"
        "sys.exit(3)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout is not None
    child.stdout.close()
    _, said = child.communicate(b"go\n")
    assert (child.returncode, said) == (3, b"")


@pytest.mark.slow
def test_a_run_where_nothing_is_as_usual(settings: dict, tmp_path: Path) -> None:
    """No UTF-8, no bars, a home that cannot be written, no hub, a reader that leaves."""
    config = tmp_path / "config.yaml"
    config.write_text(in_groups(settings | {"steps": 1}), encoding="utf-8")
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    poor = {
        "PYTHONIOENCODING": "ascii",
        "TQDM_DISABLE": "1",
        "HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "TERM": "dumb",
    }
    command = [sys.executable, "-m", "opcd.cli", "train", "--config", str(config)]
    done = subprocess.run(
        f"{' '.join(command)} 2>&1 | head -n 1",
        shell=True,
        env=os.environ | poor,
        capture_output=True,
        text=True,
        encoding="ascii",
        check=False,
    )
    assert done.stdout == "opcd 0.1.0: loading\n"
    assert (Path(settings["output_dir"]) / "scorecard.json").is_file()
