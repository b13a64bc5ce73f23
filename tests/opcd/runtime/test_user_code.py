"""Functions of a user's own, by module or by file."""

import sys
from pathlib import Path

from opcd.runtime.user_code import load_function, located


def test_a_file_imports_what_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "word_of_test.py").write_text("WORD = 'yes'\n")
    (tmp_path / "own file.py").write_text(
        "from word_of_test import WORD\ndef f(text): return text == WORD\n"
    )
    before = list(sys.path)
    function = load_function(f"{tmp_path / 'own file.py'}:f", "scorer")
    assert [function(text) for text in ("yes", "no")] == [True, False]
    assert sys.path == before


def test_files_of_one_name_are_two(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "score.py").write_text(f"def f(): return {name!r}\n")
    found = [load_function(f"{tmp_path / name / 'score.py'}:f", "scorer")() for name in "ab"]
    assert found == ["a", "b"]


def test_files_are_found_from_a_folder_and_modules_are_not() -> None:
    assert located("score.py:f", Path("/task")) == "/task/score.py:f"
    assert located("/else/score.py:f", Path("/task")) == "/else/score.py:f"
    assert located("package.score:f", Path("/task")) == "package.score:f"
