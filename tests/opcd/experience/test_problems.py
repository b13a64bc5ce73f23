"""Problems in three parts by their words alone."""

from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.experience.problems import read_problems, split
from opcd.tasks.data import Example, request_of
from opcd.tasks.held_out import Parts
from opcd.tasks.messages import assistant, user
from tests.conftest import write_jsonl


def problems(*texts: str) -> list[Example]:
    return [Example((user(text),), ("1",), "here:1") for text in texts]


def texts_of(parts: Parts) -> list[set[str]]:
    return [{request_of(p)[1] for p in part} for part in parts]


def config(tmp_path: Path, rows: list, **changed: object) -> TrainConfig:
    path = write_jsonl(tmp_path / "problems.jsonl", rows)
    return TrainConfig(context="none", output_dir="none", prompts=str(path), **changed)


def test_parts_are_disjoint_and_move_no_problem_when_one_is_added() -> None:
    texts = [f"What is {i} + {i}?" for i in range(400)]
    parts = split(problems(*texts), 0.5)
    train, validation, test = texts_of(parts)
    assert train | validation | test == {t for s in texts_of(split(problems(*texts), 0)) for t in s}
    assert not (train & validation) | (train & test) | (validation & test)
    assert 160 < len(train) < 240
    assert 70 < len(validation) < 130
    assert 70 < len(test) < 130
    fewer = texts_of(split(problems(*texts[::2][::-1]), 0.5))
    assert all(some <= whole for some, whole in zip(fewer, (train, validation, test), strict=True))


def test_spellings_of_one_problem_stay_together() -> None:
    for i in range(60):
        twice = problems(f"How  many are {i} “eggs”?", f'how many are {i} "eggs"?\n')
        parts = split(twice, 0.6)
        assert sorted(map(len, parts)) == [0, 0, 2]


def test_what_is_no_problem_is_refused(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(60)]
    assert sum(map(len, read_problems(config(tmp_path, rows, scorer="number")))) == 60
    with pytest.raises(InputError, match=r"jsonl:61: checker number must be able to find"):
        read_problems(config(tmp_path, [*rows, {"prompt": "?", "answer": "many"}], scorer="number"))
    with pytest.raises(InputError, match="equal prompts must have equal answers"):
        read_problems(config(tmp_path, [*rows, {"prompt": "1 + 1", "answer": "3"}]))
    with pytest.raises(InputError, match="none for"):
        read_problems(config(tmp_path, rows[:1]))
    own = {"system": "Count.", "prompt": "How many?", "answer": "3"}
    with pytest.raises(InputError, match=r"jsonl:61: .*without_context"):
        read_problems(config(tmp_path, [*rows, own]))
    with pytest.raises(InputError, match="must both be named"):
        read_problems(config(tmp_path, rows, test_data="test.jsonl"))


def test_a_logs_problems_are_learned_from_unless_they_are_measured_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(4)]
    files = {
        "validation_data": str(write_jsonl(tmp_path / "v.jsonl", rows[:2])),
        "test_data": str(write_jsonl(tmp_path / "t.jsonl", rows[2:])),
    }
    logged = problems("0 + 1", "7 + 1", "3 +  1")
    parts = read_problems(config(tmp_path, rows, **files), logged)
    assert [p.text for p in parts.train] == ["7 + 1"]
    # A conversation shows each of its turns, as a context and as a prompt.
    turns = [user("and"), assistant("?"), user("0 + 1"), assistant("1"), user("8 + 1")]
    for row, left in ((turns, 0), (turns[:2] + turns[4:], 1), (turns[2:], 0), (turns[:3], 0)):
        talked = Example(tuple(row), (), "here:1")
        parts = read_problems(config(tmp_path, rows, **files), [*logged, talked])
        assert len(parts.train) == 1 + left
    with pytest.raises(InputError, match="must both be named, with a log"):
        read_problems(config(tmp_path, rows), logged)


def test_a_training_problem_must_not_show_another_part_s(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} + 1", "answer": str(i + 1)} for i in range(4)]
    files = {
        "validation_data": str(write_jsonl(tmp_path / "v.jsonl", rows[:2])),
        "test_data": str(write_jsonl(tmp_path / "t.jsonl", rows[2:])),
    }
    turns = [user(" 3 + 1"), assistant("4"), user("8 + 1")]
    own = [{"prompt": "5 + 1", "answer": "6"}, {"messages": turns, "answer": "9"}]
    with pytest.raises(InputError, match=r"problems.jsonl:2: a training problem must not hold"):
        read_problems(config(tmp_path, own, **files))
