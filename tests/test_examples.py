"""The data of examples/: what every run reads before weights, and what two of them promise."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from opcd.config.settings import gather
from opcd.experience.problems import read_problems
from opcd.experience.settings import read_settings
from opcd.scoring.calls import accepted_calls
from opcd.tasks.task import TaskFiles, read_task_files

EXAMPLES = Path(__file__).parent.parent / "examples"
LOOPS = ("math", "own_experience")  # whose data the experience loop splits itself
GAMES = ("frozen_lake",)  # whose boards are generated
CONFIGS = sorted(c for c in EXAMPLES.glob("*/config.yaml") if c.parent.name not in GAMES)
TYPES = {"string": str, "integer": int}


def read(name: str) -> TaskFiles:
    """An example's files; overlaps, contradictions and answers that cannot be right are refused."""
    return read_task_files(gather({}, EXAMPLES / name / "config.yaml"))


def rows(name: str) -> list[list[dict[str, Any]]]:
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["messages"] for line in lines]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.parent.name)
def test_every_example_has_its_parts(config: Path) -> None:
    if config.parent.name in LOOPS:
        parts = read_problems(read_settings({}, config).training)._asdict()
    else:
        parts = read(config.parent.name).parts
    assert len(parts["train"]) >= 300
    assert len(parts["validation"]) >= 60
    assert len(parts["test"]) >= 200
    assert all(e.answers for e in [*parts["validation"], *parts["test"]])
    readme = (config.parent / "README.md").read_text(encoding="utf-8")
    assert [
        f.name for f in config.parent.iterdir() if f.is_file() and f"`{f.name}`" not in readme
    ] == ["README.md"]


def test_the_accepted_calls_fit_the_schemas() -> None:
    """Every tool is asked for as often as every other, with the arguments that it requires."""
    files = read("tools")
    schemas = {tool["function"]["name"]: tool["function"] for tool in files.contexts[""].tools}
    assert len(schemas) == 12
    for part, each, none in (("validation", 5, 20), ("test", 15, 60)):
        asked = dict.fromkeys([*schemas, ""], 0)
        for example in files.parts[part]:
            (answer,) = example.answers
            if not accepted_calls(answer):
                asked[""] += 1
                continue
            call = json.loads(answer)
            asked[call["name"]] += 1
            wanted = schemas[call["name"]]["parameters"]
            assert sorted(call["arguments"]) == sorted(wanted["required"]), example.source
            for name, value in call["arguments"].items():
                schema = wanted["properties"][name]
                assert type(value) is TYPES[schema["type"]], example.source
                assert value in schema.get("enum", [value]), example.source
        assert asked == {**dict.fromkeys(schemas, each), "": none}


@pytest.mark.parametrize("part", ["train", "validation", "test"])
def test_a_booking_is_what_was_said(part: str) -> None:
    """The three facts stand in the guest's words, and nothing is said behind a booking."""
    words = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for row in rows(f"conversation/{part}.jsonl"):
        said = ""
        for guest, desk in zip(row[::2], row[1::2], strict=True):
            said += f" {guest['content'].lower()}"
            if not desk["content"].startswith("{"):
                continue
            booking = json.loads(desk["content"])
            assert list(booking) == ["day", "people", "name"]
            people = booking["people"]
            assert str(people) in said or words[people] in said, row
            assert booking["day"].lower() in said, row
            assert booking["name"].lower() in said, row
            assert desk is row[-1], row


def test_the_bookings_scorer() -> None:
    score = runpy.run_path(str(EXAMPLES / "conversation" / "scorer.py"))["score"]
    due = '{"day": "Friday", "people": 4, "name": "Reed"}'
    assert score('{"name":"Reed", "day":"Friday", "people":4}\n', [due]) == {"books": True}
    assert score('{"day": "Friday", "people": 5, "name": "Reed"}', [due]) == {"books": False}
    assert score("Under which name?", [due]) == {"books": False}
    asks = "asks the next question"
    assert score(" Under which name?", ["Under which name?"]) == {asks: True}
    assert score("For which day?", ["Under which name?"]) == {asks: False}
    assert score(due, ["Under which name?"]) == {asks: False}


def test_the_word_problems_are_those_of_their_seed() -> None:
    made = runpy.run_path(str(EXAMPLES / "math" / "make_problems.py"))["problems"]()
    kept = (EXAMPLES / "math" / "problems.jsonl").read_text(encoding="utf-8").splitlines()
    assert [(row["prompt"], int(row["answer"])) for row in map(json.loads, kept)] == made
    assert len({text for text, _ in made}) == 900
    assert min(answer for _, answer in made) > 0
