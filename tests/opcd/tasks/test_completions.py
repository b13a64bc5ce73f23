"""Completions of training prompts from a file: how its rows are read, and what is said of them."""

from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.prepare import Setup, prepare
from tests.conftest import write_jsonl

END = 1  # <|im_end|>


def prepared(settings: dict, *rows: dict) -> Setup:
    """Two training prompts, and rows that complete them."""
    folder = Path(settings["output_dir"]).parent
    write_jsonl(Path(settings["prompts"]), [{"prompt": "red"}, {"prompt": "blue"}])
    path = write_jsonl(folder / "stored.jsonl", list(rows))
    return prepare(
        TrainConfig(**settings | {"guided_share": 1.0, "guided_completions": str(path)}),
        for_training=True,
    )


def completions(setup: Setup) -> list[str]:
    assert setup.completions is not None
    decode = setup.chat.decode_raw
    return [decode(ids) for p in setup.task.train for ids in setup.completions[p.key]]


RED, BLUE = {"prompt": "red", "completion": "r"}, {"prompt": "blue", "completion": "b"}


@pytest.mark.parametrize(
    ("columns", "unused"),
    [
        ({"key": 7}, "key"),
        ({"key": "a"}, "key"),
        ({"rule": "none", "contexts": {"": "x"}}, "contexts, rule"),
        ({"label": 3}, ""),
        ({"reference": "r", "answer": " "}, "reference"),
    ],
)
def test_other_columns_of_rows_mean_nothing(settings: dict, columns: dict, unused: str) -> None:
    setup = prepared(settings, RED | columns, BLUE)
    assert completions(setup) == ["r<|im_end|>", "b<|im_end|>"]
    said = f"stored.jsonl: 2 plain rows; columns left out: {unused}"
    assert setup.remarks == [said] * bool(unused)


def test_how_rows_are_read_is_said(settings: dict) -> None:
    turns = [("system", "Answer with one letter."), ("user", "red"), ("assistant", "r")]
    messages = [{"role": role, "content": text} for role, text in turns]
    setup = prepared(settings, {"messages": messages, "source": "x"}, BLUE)
    assert completions(setup) == ["r<|im_end|>", "b<|im_end|>"]
    assert setup.remarks == [
        "stored.jsonl: 1 OpenAI row, 1 plain row; the system message is the context and was taken "
        "out (1 of 2); columns left out: source"
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (RED | {"completion_token_ids": [40, END]}, r'got "completion" and "completion_token_ids"'),
        (RED | {"completion": "<|im_end|>\n"}, "stored.jsonl:1: a completion must hold an answer"),
        ({"prompt": "red", "completion_token_ids": [END]}, "1: a completion must hold an answer"),
    ],
)
def test_rows_of_two_completions_or_none(settings: dict, row: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared(settings, row, BLUE)


def test_token_ids_are_taken_as_they_are(settings: dict) -> None:
    rows = [
        {"prompt": "red", "completion_token_ids": [40, END]},
        {"prompt": "blue", "completion_token_ids": [40, 41]},
    ]
    setup = prepared(settings, *rows)
    assert [setup.completions[p.key] for p in setup.task.train] == [[[40, END]], [[40, 41]]]
    path = setup.config.guided_completions
    assert setup.remarks == [
        "stored.jsonl: 1 row of completions as token ids without an end, which none is added to, "
        f"first {path}:2"
    ]


@pytest.mark.parametrize(
    "more", [{"completion": "b<|im_end|>c"}, {"completion_token_ids": [END, 40]}]
)
def test_what_goes_on_behind_its_end_is_refused(settings: dict, more: dict) -> None:
    with pytest.raises(
        InputError, match=r"stored.jsonl:2: a completion must end .* text behind <\|im_end\|>"
    ):
        prepared(settings, RED, {"prompt": "blue"} | more)


def test_special_tokens_in_completions_and_in_place_of_the_context_are_said(settings: dict) -> None:
    settings |= {"without_context": "You are <|im_start|>."}
    said = "the models read a special token there, not its letters"
    assert prepared(settings, RED | {"completion": "<|im_start|>"}, BLUE).remarks == [
        f"<|im_start|> is spelled in 1 text, first in stored.jsonl:1: {said}",
        f"<|im_start|> is spelled in 1 text, first in without_context: {said}",
    ]


def test_a_completion_that_goes_on_behind_a_stop_string(settings: dict) -> None:
    """Where the student's would have ended."""
    behind = {"prompt": "blue", "completion": "b;"}
    with pytest.raises(InputError, match=r"stored.jsonl:2: .* got more behind ';', be it the end"):
        prepared(settings | {"stop": [";"]}, RED, behind)
    setup = prepared(settings, RED, behind)
    assert setup.completions is not None
    ids = setup.completions[setup.task.train[1].key][0]
    whole = {"prompt": "blue", "completion_token_ids": ids[:-1]}
    assert completions(prepared(settings | {"stop": [";"]}, RED, whole))[1] == "b;"
