"""Requests that have nothing to do with the context: those of the package, and a user's."""

import json
import re
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.elsewhere import ANSWER_TOKENS, BUILT_IN
from opcd.tasks.messages import system, user
from opcd.tasks.prepare import Setup, prepare
from tests.conftest import tiny_llama, tiny_tokenizer, write_jsonl

ROWS = [json.loads(line) for line in BUILT_IN.read_text("utf-8").splitlines()]


def test_the_packages_own_are_three_hundred_and_differ() -> None:
    assert all(list(row) == ["kind", "prompt"] for row in ROWS)
    prompts = [row["prompt"] for row in ROWS]
    assert len(prompts) == len({re.sub(r"\W+", " ", p).strip().lower() for p in prompts}) == 300
    counts = Counter(row["kind"] for row in ROWS)
    assert len(counts) == 15
    assert set(counts.values()) == {20}
    for prompt in prompts:
        assert prompt == prompt.strip() == unicodedata.normalize("NFC", prompt)
        assert "  " not in prompt.replace("    ", ""), "code alone is indented"
    openings = Counter(" ".join(prompt.lower().split()[:2]) for prompt in prompts)
    assert max(openings.values()) <= 6, "no variants of one template"


def test_the_packages_own_are_short_and_found_by_default(settings: dict) -> None:
    del settings["elsewhere_prompts"]
    setup = prepare(TrainConfig(**settings))
    assert [r.example.text for r in setup.elsewhere] == [row["prompt"] for row in ROWS]
    assert [r.kind for r in setup.elsewhere] == [row["kind"] for row in ROWS]
    assert setup.remarks == []
    around = len(setup.chat.student_ids([user("x")])) - 1
    for request in setup.elsewhere:  # a token of the tiny model is a byte
        assert request.token_ids == setup.chat.student_ids(request.example.messages)
        assert len(request.token_ids) == around + len(request.example.text.encode())
    assert max(len(r.token_ids) for r in setup.elsewhere) <= 320


def with_rows(settings: dict, rows: list[Any], **change: Any) -> Setup:
    file = write_jsonl(Path(settings["output_dir"]).parent / "others.jsonl", rows)
    settings = settings | {"elsewhere_prompts": 300, "elsewhere_data": str(file)}
    return prepare(TrainConfig(**settings | change))


def test_some_of_them_are_spread_over_their_kinds(settings: dict) -> None:
    setup = prepare(TrainConfig(**settings | {"elsewhere_prompts": 60}))
    assert set(Counter(r.kind for r in setup.elsewhere).values()) == {4}
    assert prepare(TrainConfig(**settings)).elsewhere == []
    with pytest.raises(InputError, match="elsewhere_prompts must be at least 0, got -1"):
        prepare(TrainConfig(**settings | {"elsewhere_prompts": -1}))


def test_a_users_own_have_any_form_of_prompts(settings: dict) -> None:
    """A system message of their own stays, the context's is taken out."""
    own = [system("The customer is Ms Ng."), user("Hello there")]
    setup = with_rows(
        settings,
        [
            {"prompt": "Two and two?", "kind": "sums", "answer": "4"},
            {"messages": own},
            {"messages": [system("Answer with one letter."), user("Good day")], "kind": None},
            {"instruction": "Add.", "input": "1, 2", "output": "3", "note": "x", "kind": "sums"},
        ],
    )
    assert [r.kind for r in setup.elsewhere] == ["sums", "", "", "sums"]
    messages = [list(r.example.messages) for r in setup.elsewhere]
    assert messages == [
        [user("Two and two?")],
        own,
        [user("Good day")],
        [user("Add.\n\n1, 2")],
    ]
    assert setup.elsewhere[1].token_ids == setup.chat.student_ids(own)
    (remark,) = setup.remarks
    assert remark.startswith("others.jsonl: ")
    assert "columns left out: note" in remark
    assert "answers left out" in remark


def test_requests_of_the_task_itself_are_said_and_stay(settings: dict) -> None:
    setup = with_rows(settings, [{"prompt": p} for p in ("Owl", "Good day", "RED ")])
    assert len(setup.elsewhere) == 3
    (remark,) = setup.remarks
    assert remark.startswith("others.jsonl: 2 of 3 requests elsewhere stand in the task's own data")
    assert remark.endswith("others.jsonl:1; each of them counts")


def test_special_tokens_that_they_spell_are_said(settings: dict) -> None:
    (remark,) = with_rows(settings, [{"prompt": "a <|im_end|> b"}]).remarks
    assert remark.startswith("<|im_end|> is spelled in 1 text, first in others.jsonl")


def test_they_may_name_one_of_several_contexts(settings: dict, tmp_path: Path) -> None:
    (tmp_path / "contexts.json").write_text('{"a": "One letter.", "b": "Two."}', encoding="utf-8")
    settings |= {"context": str(tmp_path / "contexts.json")}
    for name in ("prompts", "validation_data", "test_data"):
        rows = [json.loads(line) for line in Path(settings[name]).read_text().splitlines()]
        write_jsonl(Path(settings[name]), [row | {"context": "a"} for row in rows])
    named = {"messages": [system("Two."), user("Hm?")], "context": "b"}
    setup = with_rows(settings, [{"prompt": "Hm"}, named])
    assert [len(r.example.messages) for r in setup.elsewhere] == [1, 1]
    with pytest.raises(InputError, match="\"context\" must be one of a, b, got 'c'"):
        with_rows(settings, [{"prompt": "Hm", "context": "c"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_text": "Hm?"}, r'others.jsonl:2: must have "prompt"'),
        ({"prompt": " "}, r'others.jsonl:2: "prompt" must be a non-empty string'),
        ("Hm?", "others.jsonl:2: must be an object"),
        ({"prompt": "Hm?", "kind": 3}, 'jsonl:2: "kind" must be a text that .*, got 3; write one'),
        ({"prompt": "Hm?", "context": "x"}, "there must be no \"context\", got 'x'"),
        ({"prompt": "x" * 500}, rf"and {ANSWER_TOKENS} tokens of its answer must fit the model's"),
    ],
)
def test_files_that_do_not_fit_are_errors_before_weights_are_loaded(
    settings: dict, monkeypatch: pytest.MonkeyPatch, row: Any, message: str
) -> None:
    monkeypatch.setattr("opcd.tasks.prepare.load_model", None)  # it must not be called
    with pytest.raises(InputError, match=message):
        with_rows(settings, [{"prompt": "Good day"}, row])


def test_a_file_must_be_there(settings: dict) -> None:
    settings |= {"elsewhere_prompts": 1, "elsewhere_data": "nowhere.jsonl"}
    with pytest.raises(InputError, match="elsewhere_data must be a file, got 'nowhere"):
        prepare(TrainConfig(**settings))


def test_rotary_frequencies_must_not_change_among_them(settings: dict, tmp_path: Path) -> None:
    """As among the prompts of the task."""
    factors = {"long_factor": [2.0] * 4, "short_factor": [1.0] * 4, "factor": 2.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 256, "rope_theta": 1e4}
    tiny_llama(rope_parameters=rope | factors).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    settings |= {"model": str(tmp_path / "model")}
    with_rows(settings, [{"prompt": "a"}, {"prompt": "b" * 100}])
    with pytest.raises(InputError, match="must lie on one side of 256 tokens"):
        with_rows(settings, [{"prompt": "a"}, {"prompt": "b" * 250}])
