"""When an answer counts."""

from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.tasks.scorers import load_scorer


@pytest.mark.parametrize(
    ("spec", "completion", "answers", "right"),
    [
        ("exact", " Music.\n", ["music"], True),
        ("exact", "two  words!", ["Two words"], True),
        ("exact", "music player", ["music"], False),
        ("exact", "", ["music"], False),
        ("exact", "", ["."], False),
        ("exact", " ... ", ["..."], True),
        ("contains", "It is MUSIC, surely", ["weather", "music"], True),
        ("contains", "musical", ["music"], False),
        ("contains", "costs 3.50 now", ["3.50"], True),
        (r"regex:label=(\w+)", "the label=taxi here", ["taxi"], True),
        (r"regex:label=(\w+)", "the label=cab here", ["taxi"], False),
        (r"regex:label=(\w+)", "nothing", ["taxi"], False),
        (r"regex:\d+", "about 42 of them", ["42"], True),
    ],
)
def test_scorers(spec: str, completion: str, answers: list[str], right: bool) -> None:
    assert load_scorer(spec)(completion, answers) is right


def test_a_function_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorer_module.py").write_text("def longer(c, a): return len(c) > len(a[0])\n")
    monkeypatch.chdir(tmp_path)
    score = load_scorer("python:my_scorer_module:longer")
    assert score("abc", ["ab"]) is True
    assert score("a", ["ab"]) is False
    (tmp_path / "my_broken_module.py").write_text("def broken(:")
    with pytest.raises(InputError, match="SyntaxError"):
        load_scorer("python:my_broken_module:broken")
    with pytest.raises(InputError, match="has no 'shorter'"):
        load_scorer("python:my_scorer_module:shorter")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("fuzzy", "exact, contains"),
        ("regex:", "exact, contains"),
        ("regex:(", "valid regular expression"),
        ("python:no_such_module_here:f", "importable module"),
    ],
)
def test_scorers_that_do_not_exist(spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_scorer(spec)
