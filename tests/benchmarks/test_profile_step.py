"""The profile of a step, on a CPU: every phase is told and kept."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import profile_step
from benchmarks.problems import Problem


def test_every_phase_is_told_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    problem = Problem("qwen2.5-tiny", 32, 8, 2, 8, 2)
    monkeypatch.setattr(profile_step, "PROBLEMS", [problem])
    monkeypatch.setattr(profile_step, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(profile_step, "DTYPE", torch.float32)
    monkeypatch.setattr(profile_step, "RESULTS", tmp_path)
    monkeypatch.setattr(profile_step, "origin", lambda: {"device": "a CPU", "commit": "0123"})
    monkeypatch.setattr(sys, "argv", ["profile_step", "--save", "name"])
    profile_step.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["rollout", "teacher", "update"]
    (row,) = json.loads((tmp_path / "profile-name.json").read_text())
    assert (row["device"], row["commit"], row["context"]) == ("a CPU", "0123", 32)
    for phase in ("rollout", "teacher", "update"):
        assert 0 < row[phase]["busy_ms"] <= row[phase]["wall_ms"]
        assert row[phase]["top"][0]["ms"] > 0
