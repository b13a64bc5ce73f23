"""A report outlives whatever its parts do, and says it."""

import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_report
from benchmarks.gpu_report import CPU_PARTS, FACTS, GPU_PARTS, Part, has_gpu, missing, report
from benchmarks.report_page import page

ROW = {"device": "X", "question": "loss", "provider": "ours", "N": 8, "median_s": 0.25}
ROW |= {"floor_share": 0.5}
WRITES = f"import json, sys; json.dump([{ROW!r}], open(sys.argv[1], 'w'))"
TESTS = """
import pytest
def test_passes(): pass
def test_fails(): assert 1 == 2, "one is not two"
def test_skips(): pytest.skip("needs a Hopper")
"""


def part(name: str, code: str, limit_s: float = 60, **more: object) -> Part:
    return Part(name, "A question", ("-c", code, "{rows}"), limit_s, **more)


def asked(parts: list[Part], folder: Path, total_s: float = 60) -> tuple[dict[str, dict], str]:
    found = report(parts, folder, "cpu, reduced", total_s, tell=lambda line: None)
    written = json.loads((folder / "report.json").read_text())
    assert written == found
    return {p["name"]: p for p in found["parts"]}, (folder / "report.md").read_text()


def test_a_part_takes_no_other_along(tmp_path: Path) -> None:
    parts, text = asked(
        [
            part("machine", "import json, sys; json.dump({'device': 'X'}, open(sys.argv[1], 'w'))"),
            part("dies", "import os; print('last words', flush=True); os.abort()"),
            part("raises", "raise ValueError('no such kernel')"),
            part("lacks", WRITES, needs=("torch", "no_such_package")),
            part("works", WRITES),
        ],
        tmp_path / "report",
    )
    assert {name: p["state"] for name, p in parts.items()} == {
        "machine": "done",
        "dies": "failed",
        "raises": "failed",
        "lacks": "gap",
        "works": "done",
    }
    assert "last words" in parts["dies"]["failures"][0]["traceback"]
    assert "ValueError: no such kernel" in parts["raises"]["failures"][0]["traceback"]
    assert parts["works"]["rows"] == [ROW]
    assert text.startswith("# Report: X\n")
    assert "there was no GPU" in text
    for said in ("last words", "no such kernel", "not installed: no_such_package"):
        assert said in text
    assert "| ours | 0.25 | 0.5 |" in text


def test_a_part_that_hangs_is_stopped_and_what_it_wrote_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_report, "LAST_WORDS_S", 0.2)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    hangs = f"{deaf}{WRITES}\nopen(sys.argv[1], 'a').close(); time.sleep(60)"
    start = time.monotonic()
    parts, text = asked([part("hangs", hangs, limit_s=1.5), part("works", WRITES)], tmp_path / "r")
    assert time.monotonic() - start < 20
    assert parts["hangs"]["state"] == "timed out"
    assert parts["hangs"]["failures"][0]["name"] == "stopped after 2 s"
    assert parts["works"]["state"] == "done"
    assert "Timed out" in text


def test_the_time_of_all_is_bounded(tmp_path: Path) -> None:
    parts, _ = asked([part("first", WRITES), part("second", WRITES)], tmp_path / "r", total_s=0.5)
    assert [p["state"] for p in parts.values()] == ["gap", "gap"]
    assert parts["second"]["gaps"] == ["no time was left of 0 s"]


def test_tests_are_counted_with_their_tracebacks_and_reasons(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(TESTS)
    command = gpu_report._pytest(str(tmp_path / "test_it.py"), "-c", str(tmp_path / "none.ini"))
    (tmp_path / "none.ini").write_text("[pytest]\n")
    parts, text = asked([Part("tests", "Tests", command, 60, ("pytest",))], tmp_path / "r")
    found = parts["tests"]
    assert found["tests"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["state"] == "failed"
    assert "one is not two" in found["failures"][0]["traceback"]
    assert found["gaps"] == ["test_skips: needs a Hopper"]
    assert "1 passed, 1 failed, 1 skipped." in text
    assert "one is not two" in text


def test_one_error_is_told_once_on_the_page() -> None:
    failures = [
        {"name": name, "traceback": f"in {name}\nE   {error}"}
        for name, error in (("a", "no driver"), ("b", "no driver"), ("c", "wrong sum"))
    ]
    answer = {"name": "tests", "question": "What", "state": "failed", "failures": failures}
    text = page({"form": "gpu", "machine": {}, "parts": [answer]})
    assert text.count("no driver") == 1
    assert "And by the same error: b." in text
    assert "in c\nE   wrong sum" in text


def test_a_timeline_is_told() -> None:
    gap, kernel = {"ms": 1.5, "host": "python", "before": "gemm"}, {"ms": 2.0, "name": "gemm"}
    phase = {"wall_ms": 4.0, "busy_ms": 2.5, "idle_share": 0.375, "launches": 3, "kernels": 3}
    row = {"model": "tiny", "update": phase | {"gaps": [gap], "top": [kernel]}}
    answer = {"name": "timeline", "question": "What", "state": "done", "rows": [row]}
    text = page({"form": "gpu", "machine": {"device": "X"}, "parts": [answer]})
    assert "| update | 4 | 2.5 | 0.375 | 3 | 3 |" in text
    assert "1.5 ms in python before gemm" in text
    assert "there was no GPU" not in text


def test_both_forms_ask_the_same_and_name_what_they_run() -> None:
    assert [p.name for p in CPU_PARTS] == [p.name for p in GPU_PARTS]
    root = gpu_report.ROOT
    for p in [*CPU_PARTS, *GPU_PARTS, FACTS]:
        files = [word for word in p.command if word.endswith(".py")]
        assert all((root / file).is_file() for file in files)
        modules = [word for word in p.command if word.startswith("benchmarks.")]
        assert all((root / f"{m.replace('.', '/')}.py").is_file() for m in modules)
    (designs,) = (p for p in CPU_PARTS if p.name == "designs")
    assert missing(designs)


def test_a_process_is_asked_for_the_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\nexit 0\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    assert has_gpu()
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    assert not has_gpu()
