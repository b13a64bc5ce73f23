"""Prompts that are kept out of training."""

from dataclasses import replace

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.data import Example, alike_remarks
from opcd.tasks.held_out import hold_out
from opcd.tasks.messages import system


def prompts(*texts: str) -> list[Example]:
    return [
        Example(({"role": "user", "content": text},), (), f"p.jsonl:{i}")
        for i, text in enumerate(texts, 1)
    ]


MANY = prompts(*(f"How do I turn {i}?" for i in range(150)))


def test_a_third_chooses_and_two_thirds_test() -> None:
    train, validation, test = hold_out(MANY, 0.3)
    assert [len(train), len(validation), len(test)] == [105, 15, 30]
    assert {e.source for part in (train, validation, test) for e in part} == {
        e.source for e in MANY
    }
    lines = [int(e.source.partition(":")[2]) for e in test]
    assert lines == sorted(lines)
    assert max(lines) - min(lines) > 75, "spread over the file"


def test_a_request_is_in_one_part() -> None:
    twice = [*MANY, *prompts(*(f"how do I turn {i}?" for i in range(150)))]
    parts = hold_out(twice, 0.3)
    asked = [{e.text.lower() for e in part} for part in parts]
    assert not asked[0] & asked[1]
    assert not asked[2] & (asked[0] | asked[1])
    assert [len(part) for part in parts] == [210, 30, 60]


def test_a_request_behind_two_contexts_is_in_one_part() -> None:
    both = [replace(e, context=context) for context in ("bank", "shop") for e in MANY]
    parts = hold_out(both, 0.3)
    asked = [{e.text for e in part} for part in parts]
    assert [len(part) for part in parts] == [210, 30, 60]
    assert not asked[0] & (asked[1] | asked[2])
    assert not asked[1] & asked[2]


def test_a_request_behind_two_system_messages_is_in_one_part() -> None:
    days = [
        replace(e, messages=(system(f"It is {day}."), *e.messages))
        for day in ("Monday", "Tuesday")
        for e in MANY
    ]
    parts = hold_out(days, 0.3)
    assert [len(part) for part in parts] == [210, 30, 60]
    lines = alike_remarks({"train": days[:150], "test": days[150:200]})
    assert lines == [
        "50 of 50 test requests are trained on behind another system message: they count as "
        "others, and may flatter"
    ]
    assert alike_remarks(parts._asdict()) == []


def test_what_is_added_moves_few() -> None:
    before = {e.text for e in hold_out(MANY, 0.3).test}
    after = {e.text for e in hold_out([*MANY, *prompts("And this?")], 0.3).test}
    assert len(before & after) >= 28


def test_one_is_left_to_train_on() -> None:
    parts = hold_out(MANY[:64], 1.0)
    assert [len(part) for part in parts] == [1, 21, 42]
    with pytest.raises(InputError, match="held_out_share must be below 1, got 1"):
        TrainConfig(context="c.md", output_dir="run", held_out_share=1).check()


def test_of_few_or_of_no_share_none_is_kept() -> None:
    for part in (hold_out(MANY[:39], 0.3), hold_out(MANY, 0.0)):
        assert part.train
        assert not part.validation
        assert not part.test
