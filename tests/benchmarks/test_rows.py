"""Rows from runs, and what is told of them."""

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plots, summary
from benchmarks import rows as rows_module
from benchmarks.rounds import Rounds
from benchmarks.rows import RESULTS, case, cases, facts, problem, read

BENCHMARKS = """
import os
def test_times(benchmark):
    benchmark.time(lambda: None, 2)
    benchmark.facts |= {"N": 8}
def test_times_nothing(benchmark): pass
def test_dies(benchmark): os._exit(3)
"""

RUN = [
    {
        "device": "a GPU",
        "python": "3.12.1",
        "torch": "2.11.0",
        "commit": "0123+changes",
        "date": "2026-01-02",
        "question": "step",
        "provider": provider,
        "model": "tiny",
        "micro_batch": micro_batch,
        "teacher": teacher,
        "rollout_s": 2.125,
        "teacher_s": 0.25,
        "update_s": 1.0,
        "B": 4,
        "new_tokens": 64,
        "tokens_per_s": 512,
        "peak_mib": None,
        "share_nobody_foresaw": 0.5,
        "median_s": 1.257,
        "min_s": 1.0,
        "q1_s": 1.1,
        "q3_s": 1.3,
        "max_s": 2.0,
        "rounds": 5,
    }
    for provider, micro_batch, teacher in (("ours", 16, "packed, sdpa"), ("peer", 8, "in full"))
]


@pytest.fixture
def rows(tmp_path: Path) -> list[dict]:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(RUN))
    return read(file)


def test_rounds_become_a_row() -> None:
    rounds, calls = Rounds(), []
    rounds.time(lambda: calls.append("call"), 3, before=lambda: calls.append("before"))
    assert calls == ["before", "call"] * 3
    assert len(rounds.seconds) == 3
    rounds = Rounds()
    rounds.facts |= {"question": "step", "N": 8}
    rounds.given([4.0, 1.0, 2.0, 3.0, 5.00004])
    row = rounds.row()
    assert (row["question"], row["N"], row["rounds"]) == ("step", 8, 5)
    assert [row[f"{k}_s"] for k in ("min", "q1", "median", "q3", "max")] == [1, 2, 3, 4, 5]


def test_a_row_says_whose_code_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPCD_COMMIT", "0123abc")
    assert rows_module.commit() == "0123abc"
    monkeypatch.delenv("OPCD_COMMIT")
    monkeypatch.setenv("PATH", "")  # no git
    assert rows_module.commit() == "unknown"


def test_a_benchmark_leaves_the_rows_before_it(tmp_path: Path) -> None:
    """Each row is written when it is made."""
    (tmp_path / "test_it.py").write_text(BENCHMARKS)
    file = tmp_path / "rows.json"
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command += ["-p", "benchmarks.conftest", f"--rows={file}", str(tmp_path / "test_it.py")]
    subprocess.run(command, cwd=RESULTS.parents[1], check=False, capture_output=True)
    (row,) = read(file)
    assert (row["question"], row["N"], row["rounds"]) == ("test_times", 8, 2)
    assert {"device", "torch", "commit", "date"} <= row.keys()


def test_a_run_becomes_rows(rows: list[dict]) -> None:
    assert len(rows) == 2
    row = rows[0]
    assert (row["device"], row["commit"], row["date"]) == ("a GPU", "0123+changes", "2026-01-02")
    assert (row["median_s"], row["q1_s"], row["rounds"]) == (1.257, 1.1, 5)
    assert case(row) == "tiny, B 4, 64 new tokens"
    assert problem(row) == {"model": "tiny", "B": 4, "new_tokens": 64}
    chosen = {"micro_batch": 16, "teacher": "packed, sdpa"}
    times = {"rollout_s": 2.125, "teacher_s": 0.25, "update_s": 1.0}
    other = {"tokens_per_s": 512, "peak_mib": None, "share_nobody_foresaw": 0.5}
    assert facts(row) == {**chosen, **times, **other}
    assert [len(group) for _, group in cases(rows)] == [2]  # who chose otherwise is beside it


def test_the_table_shows_facts_that_nobody_foresaw(rows: list[dict]) -> None:
    lines = summary.table(rows).splitlines()
    assert lines[0] == "a GPU, 0123+changes, 2026-01-02"
    assert lines[2] == "step: tiny, B 4, 64 new tokens"
    names = ["median_s", "micro_batch", "teacher", "rollout_s", "teacher_s", "update_s"]
    assert lines[3].split() == [*names, "tokens_per_s", "share_nobody_foresaw"]
    assert lines[4].split()[:5] == ["ours", "1.257", "16", "packed,", "sdpa"]
    assert lines[5].split()[:5] == ["peer", "1.257", "8", "in", "full"]
    assert lines[5].split()[5:] == ["2.125", "0.25", "1", "512", "0.5"]
    assert len({len(line) for line in lines[3:]}) == 1


def test_rows_are_kept_by_question_and_drawn(
    rows: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(plots, "DOCS", tmp_path)
    summary.save(rows, "name")
    assert read(tmp_path / "step-name.json") == rows
    text = "".join(ElementTree.parse(tmp_path / "step-name.svg").getroot().itertext())
    for shown in ("step: tiny, B 4, 64 new tokens", "a GPU", "peer", "2.12", "3.38"):
        assert shown in text
    for phase in ("rollout", "teacher", "update"):
        assert text.count(phase) == 2  # a part of the bars, and its column


def test_every_stored_result_with_times_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots, "DOCS", tmp_path)
    drawn = plots.draw_results(sorted(RESULTS.glob("*.json")))
    names = [file.name for file in drawn]
    assert {"loss-cpu.svg", "teacher-cpu.svg"} <= set(names)
    assert "demo-cpu.svg" not in names  # holds no rows
    for file in drawn:
        text = "".join(ElementTree.parse(file).getroot().itertext())
        stored = read(RESULTS / f"{file.stem}.json")
        assert all(row["provider"] in text for row in stored)
        assert ("floor: the products" in text) == ("floor_share" in stored[0])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.name)
def test_docs_show_the_stored_results(file: Path) -> None:
    rows = [row for row in read(file) if "median_s" in row]
    plot = plots.DOCS / f"{file.stem}.svg"
    assert plot.exists() == bool(rows), "python -m benchmarks.summary --plots"
    shown = plot.read_text(encoding="utf-8") if rows else ""
    for row in rows:
        assert row["provider"] in shown
        assert row["date"] in shown
