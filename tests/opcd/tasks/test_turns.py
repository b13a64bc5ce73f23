"""Training rows turn by turn: which prompts come of them, and what stays out of training."""

from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.conversation import learned_turns
from opcd.tasks.data import request_of
from opcd.tasks.messages import assistant, user
from opcd.tasks.task import TaskFiles, read_task_files
from tests.conftest import write_jsonl


def chat(text: str) -> list[dict[str, str]]:
    """Messages of one letter, which says whose they are, and words: "u one. a two"."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    said = [part.strip().split(" ", 1) for part in text.split(".")]
    return [{"role": roles[who], "content": words} for who, words in said]


def files(settings: dict, *rows: str | dict, **overrides: Any) -> TaskFiles:
    given = [{"messages": chat(row)} if isinstance(row, str) else row for row in rows]
    write_jsonl(Path(settings["prompts"]), given)
    return read_task_files(TrainConfig(**settings | {"turns": "all"} | overrides).check())


def asked(found: TaskFiles, part: str = "train") -> list[str]:
    letter = {"system": "s", "user": "u", "assistant": "a"}
    return [
        ". ".join(f"{letter[m['role']]} {m['content']}" for m in example.messages)
        for example in found.parts[part]
    ]


ROWS = ("s May. u one. a 1. u two. a 2. u three. a 3", "u four. a 4. u five", "u six")


def test_each_assistant_turn_gives_a_prompt(settings: dict) -> None:
    found = files(settings, *ROWS)
    assert asked(found) == [
        "s May. u one",
        "s May. u one. a 1. u two",
        "s May. u one. a 1. u two. a 2. u three",
        "u four",
        "u four. a 4. u five",
        "u six",
    ]
    lines = [example.source.rpartition(":")[2] for example in found.parts["train"]]
    assert lines == ["1", "1", "1", "2", "2", "3"]
    assert found.remarks[-1] == ("prompts.jsonl: 6 prompts of 3 rows, one for each assistant turn")
    assert asked(files(settings, *ROWS, turns="last")) == [
        "s May. u one. a 1. u two. a 2. u three",
        "u four. a 4. u five",
        "u six",
    ]


def test_a_greeting_answers_nothing(settings: dict) -> None:
    found = files(settings, "a hello. u one. a 1", "s May. a hello. u two")
    assert asked(found) == ["a hello. u one", "s May. a hello. u two"]
    assert found.remarks[-1].endswith("2 that nothing stands in front of are history")


def test_validation_and_test_rows_are_as_before(settings: dict) -> None:
    write_jsonl(Path(settings["test_data"]), [{"messages": chat("u x. a 1. u y. a 2")}])
    assert asked(files(settings, *ROWS), "test") == ["u x. a 1. u y"]


def test_no_prompt_may_be_a_test_request(settings: dict) -> None:
    """Nor one of the context's demonstrations; inner ones as well."""
    with pytest.raises(InputError, match=r"prompts\.jsonl:1 .*test\.jsonl:1|1 overlap: .*'cat'"):
        files(settings, "u cat. a c. u why. a so")
    context = Path(settings["context"]).with_suffix(".json")
    context.write_text('[{"role": "user", "content": "hm"}, {"role": "assistant", "content": "1"}]')
    files(settings, "u one. a 1. u hm", context=str(context))
    with pytest.raises(InputError, match=r"prompts\.jsonl:2 is demonstration 1 of the context"):
        files(settings, "u one", "u hm. a 2. u why. a so", context=str(context))


@pytest.mark.parametrize("overrides", [{"turns": "all"}, {"source": "recorded", "turns": "all"}])
def test_turns_behind_one_another_are_refused(settings: dict, overrides: dict) -> None:
    with pytest.raises(InputError, match=r"prompts\.jsonl:2: each assistant turn .* message 2 beh"):
        files(settings, "u one. a 1", "u two. a 2. a 2b. u three. a 3", **overrides)


@pytest.mark.parametrize("source", ["sampled", "recorded"])
def test_what_is_held_out_is_in_no_prompt(settings: dict, source: str) -> None:
    """Rows 0 to 19 stand inside of rows 20 to 39, which go on."""
    rows = [f"u one {i}. a 1" for i in range(20)]
    rows += [f"u one {i}. a 1. u two {i}. a 2" for i in range(20)]
    rows += [f"u go {i}. a 1. u on {i}. a 2. u end {i}. a 3" for i in range(60)]
    whole = {"validation_data": None, "test_data": None, "source": source}
    found = files(settings, *rows, **whole)
    kept = [example for part in ("validation", "test") for example in found.parts[part]]
    assert [len(found.parts[part]) for part in ("validation", "test")] == [10, 20]
    lines = {int(example.source.rpartition(":")[2]) for example in kept}
    assert len(lines) == 30, "one request a row"
    assert min(lines) > 20, "what other rows go on from is trained on"
    assert {len(example.messages) for example in kept} == {3, 5}, "a row's last turn"
    trained = {int(example.source.rpartition(":")[2]) for example in found.parts["train"]}
    assert not lines & trained, "a conversation is in one part"
    requests = {request_of(example) for example in kept}
    assert not requests & {request_of(example) for example in found.parts["train"]}
    assert "of 100 conversations 70 are trained on" in " ".join(found.remarks)
    prompts = sum(1 + (line > 20) + (line > 40) for line in trained)
    counted = f"prompts.jsonl: {prompts} prompts of 70 rows, one for each assistant turn"
    assert [remark for remark in found.remarks if remark.startswith(counted)]


def test_what_is_held_out_without_conversations_is_as_before(settings: dict) -> None:
    rows = [f"u one {i}" for i in range(60)]
    whole = {"validation_data": None, "test_data": None}
    found = [files(settings, *rows, turns=turns, **whole) for turns in ("last", "all")]
    for part in ("train", "validation", "test"):
        assert asked(found[0], part) == asked(found[1], part)


def recorded(settings: dict, *rows: str | dict) -> TaskFiles:
    return files(settings, *rows, source="recorded")


def test_recorded_rows_are_conversations(settings: dict) -> None:
    found = recorded(
        settings,
        "u one. a 1. u two. a 2",
        "u three. a 3. u bye",
        {"prompt": "four", "completion": "4"},
        {"prompt": chat("u five"), "completion": chat("a 5")},
        {"instruction": "six", "output": "6"},
    )
    rows = [[m["content"] for m in example.conversation] for example in found.parts["train"]]
    texts = ["one 1 two 2", "three 3", "four 4", "five 5", "six 6"]
    assert rows == [text.split() for text in texts]
    assert "what stands behind the last assistant turn left out (1 of 5)" in found.remarks[-2]
    assert found.remarks[-1] == (
        "prompts.jsonl: 6 prompts of 5 rows, one for each assistant turn, which is trained on as "
        "it was recorded"
    )


@pytest.mark.parametrize("key", [{"weight": 0}, {"train": False}, {"loss": False}], ids=str)
def test_recorded_turns_of_weight_0_are_history(settings: dict, key: dict) -> None:
    """Also the last one, as message or as completion: then the row ends in front of it."""
    (one, first), (two, second) = (chat(f"u {n}. a {n}") for n in ("one", "two"))
    found = recorded(
        settings,
        {"messages": [one, first | key, two, second | {"weight": 1}]},
        {"messages": [user("three"), first, two, second | key]},
        {"prompt": chat("u four. a 4. u five"), "completion": [assistant("5") | key]},
    )
    trained = [
        [example.conversation[i]["content"] for i in learned_turns(example.conversation, "")]
        for example in found.parts["train"]
    ]
    assert trained == [["two"], ["one"], ["4"]]
    assert "assistant turns of weight 0 are not trained on" in found.remarks[-2]
    assert found.remarks[-1].startswith("prompts.jsonl: 3 prompts of 3 rows")


def test_weights_of_turns_mean_nothing_where_the_student_answers(settings: dict) -> None:
    one, first = chat("u one. a 1")
    assert len(files(settings, {"messages": [one, first | {"weight": 0}, one]}).parts["train"]) == 2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [user("one"), assistant("1") | {"weight": 0}]}, "and not of weight 0, got"),
        (
            {"messages": [user("one"), assistant("1") | {"weight": 0.5}]},
            '"weight" of message 1 must be 0 or 1, got 0.5; correct it, or remove it',
        ),
        ("u one", r"must hold an assistant turn behind a user's message, .* got roles user; add"),
        ("a hello. u one", "got roles assistant, user"),
        ({"prompt": "one", "chosen": "1"}, 'rename it to "completion"'),
        ({"prompt": "one", "completion": "1", "response": "2"}, "must have one completion"),
    ],
)
def test_recorded_rows_without_a_turn_are_refused(
    settings: dict, row: str | dict, message: str
) -> None:
    with pytest.raises(InputError, match=rf"prompts\.jsonl:2: .*{message}"):
        recorded(settings, "u zero. a 0", row)


def test_no_recorded_turn_may_answer_a_test_request(settings: dict) -> None:
    with pytest.raises(InputError, match="must be disjoint"):
        recorded(settings, "u cat. a c. u why. a so")
