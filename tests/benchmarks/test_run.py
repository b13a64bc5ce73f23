"""A benchmark that dies takes no other's rows with it."""

import sys
from pathlib import Path

import pytest

from benchmarks import run


def test_each_file_has_a_process_and_rows_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    codes = {
        "bench_dies": "import os; os.abort()",
        "bench_fails": "import sys; open(sys.argv[1], 'w').write('[]'); sys.exit(1)",
        "bench_nothing": "import sys; sys.exit(5)",
        "bench_works": "import sys; open(sys.argv[1], 'w').write('[]')",
    }
    for name, code in codes.items():
        (tmp_path / f"{name}.py").write_text(code)
    folder = tmp_path / "latest"
    folder.mkdir()
    (folder / "bench_dies.json").write_text("[]")  # of an earlier run
    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "FOLDER", folder)
    monkeypatch.setattr(
        run, "_pytest", lambda file, rest: [sys.executable, str(file), str(run._json(file.stem))]
    )
    files, failed = run.measure(["-k", "a part"])
    assert [file.stem for file in files] == ["bench_fails", "bench_works"]
    assert [name.split()[0] for name in failed] == ["bench_dies", "bench_fails"]
    assert "failed: bench_dies (exit status -6), bench_fails" in capsys.readouterr().out
