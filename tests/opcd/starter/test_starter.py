"""What `opcd init` writes."""

from collections import Counter
from pathlib import Path

import pytest

from opcd.cli import main
from opcd.config.settings import gather
from opcd.tasks.task import read_task_files


def test_it_is_a_task_that_can_be_read(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tmp_path / "my: task #1"
    assert main(["init", str(folder)]) == 0
    assert f"opcd train --config '{folder / 'config.yaml'}'" in capsys.readouterr().out
    config = gather({}, folder / "config.yaml")
    assert config.output_dir == str(folder / "run")
    assert config.origins["divergence_prompts"] == "preset laptop"
    files = read_task_files(config)  # refuses requests that stand in two files
    assert {name: len(part) for name, part in files.parts.items()} == {
        "train": 60,
        "validation": 24,
        "test": 36,
    }
    for part in ("validation", "test"):
        counts = Counter(example.answers for example in files.parts[part])
        assert len(counts) == 3
        assert len(set(counts.values())) == 1


def test_it_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "mine").write_text("")
    assert main(["init", str(tmp_path)]) == 2
    assert "must not be there yet, or be empty" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["mine"]
