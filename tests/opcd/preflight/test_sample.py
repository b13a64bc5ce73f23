"""Which requests a prompt is looked at by."""

from pathlib import Path

from opcd.config import TrainConfig
from opcd.preflight.sample import SAMPLE, sample, sample_line
from opcd.tasks.prepare import prepare
from opcd.tasks.task import Task
from tests.conftest import write_jsonl


def task(settings: dict, **overrides: object) -> Task:
    return prepare(TrainConfig(**settings | overrides)).task


def test_those_that_are_judged_alone(settings: dict) -> None:
    found = task(settings)
    assert sample(found) == found.validation
    assert sample_line(sample(found), found) == "sample    3 requests, whose answers are judged"


def test_of_others_as_many_as_there_are(settings: dict) -> None:
    unlabelled = {"validation_data": None, "test_data": None}
    rows = [{"prompt": f"What is {i}?"} for i in range(90)]
    for count, expected in ((60, 48), (90, SAMPLE)):  # less a fifth of the prompts for the test
        write_jsonl(Path(settings["prompts"]), rows[:count])
        found = task(settings, **unlabelled)
        cases = sample(found)
        assert len(cases) == expected
        assert not [case for case in cases if case in found.test]
        assert any(case in found.validation for case in cases)
    assert sample_line(cases, found) == "sample    64 requests, whose answers nothing judges"


def test_a_rule_judges_training_prompts_too(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "rule.py").write_text("def f(completion):\n    return len(completion) < 9\n")
    found = task(settings, scorer=f"python:{tmp_path / 'rule.py'}:f")
    assert sample(found) == [*found.validation, *found.training]


def test_test_data_where_nothing_else_is_there(settings: dict) -> None:
    found = task(settings, prompts=None, validation_data=None)
    assert sample(found) == found.test
