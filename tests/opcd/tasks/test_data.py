"""Prompts and labelled examples: what each mistake is told, and what must hold between parts."""

import json
from pathlib import Path

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.contexts import Context, read_contexts
from opcd.tasks.data import (
    Example,
    check_contexts,
    check_disjoint,
    check_same_answers,
    read_examples,
    repeat_remarks,
)
from opcd.tasks.messages import Message
from opcd.tasks.task import read_task_files

SYSTEM = [{"role": "system", "content": "Answer in one word."}]
CONTEXT = {"": Context(SYSTEM)}


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_prompts_and_messages_and_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "answer": "x"}\n\n'
        '{"messages": [{"role": "user", "content": "b"}], "answer": ["y", "z"]}\n',
    )
    (first, second), remarks = read_examples(path, True, CONTEXT)
    assert (first.text, first.answers, first.source) == ("a", ("x",), f"{path}:1")
    assert (second.text, second.answers, second.source) == ("b", ("y", "z"), f"{path}:3")
    assert remarks == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: each line must be one JSON object"),
        ("[1]", ":2: must be an object"),
        ('{"text": "a"}', 'rename "text" to "prompt" if it is that'),
        ('{"prompt": "a", "messages": []}', "one column, got prompt and messages"),
        ('{"prompt": ""}', "non-empty string"),
        ('{"prompt": 3}', "non-empty string"),
        (r'{"prompt": "a \ud800 b"}', "lone surrogate"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "message 0 must answer a call"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "last message must be the user"),
        ('{"prompt": "a", "answer": {"text": "x"}}', "a string, a number"),
        ('{"prompt": "a", "context": " ", "answer": "x"}', "must be the name of one"),
        ('{"prompt": "a"}', 'needs "answer"'),
        ('{"prompt": "a", "prompt": "b"}', "stands twice"),
        ('{"prompt": "a", "answer": " "}', "must not be blank"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "ok", "answer": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_examples(path, True, CONTEXT)


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    assert [e.text for e in read_examples(path, False, CONTEXT)[0]] == ["a\u2028b", "c"]


def example(
    text: str, source: str, *answers: str, context: str = "", before: tuple[Message, ...] = ()
) -> Example:
    return Example((*before, {"role": "user", "content": text}), answers, source, context)


DEMO = [{"role": "user", "content": "Demo"}, {"role": "assistant", "content": "x"}]


def test_prompts_in_two_parts_or_in_the_context_are_refused_all_at_once() -> None:
    train = [example(f"Hello  {i}", f"t:{i}") for i in range(8)]
    test = [example(f"hello {i}", f"e:{i}") for i in range(1, 8)]
    check_disjoint({"train": train * 2, "test": []}, {"": Context(DEMO)})
    with pytest.raises(InputError) as refused:
        check_disjoint(
            {"train": [example("demo", "t:9"), *train], "test": test}, {"": Context(DEMO)}
        )
    assert str(refused.value) == (
        "training, validation and test prompts must be disjoint from each other and from the "
        "context's demonstrations, got 8 overlaps: t:9 is demonstration 1 of the context ('demo'); "
        "e:1 is t:1 ('hello 1'); e:2 is t:2 ('hello 2'); e:3 is t:3 ('hello 3'); "
        "e:4 is t:4 ('hello 4'); and 3 more at e:5, 6, 7; remove one of each"
    )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Mon caf\u00e9 ?", "mon cafe\u0301 ?"),
        ('I can\'t "log in"', "I can\u2019t \u201clog in\u201d"),
        ("Hello", "hello\u200b"),
        ("Stra\u00dfe \uff12", "STRASSE 2"),
    ],
)
def test_prompts_overlap_in_every_spelling(one: str, other: str) -> None:
    with pytest.raises(InputError, match="got 1 overlap: e:1 is t:1"):
        check_disjoint({"train": [example(one, "t:1")], "test": [example(other, "e:1")]}, CONTEXT)


@pytest.mark.parametrize("context", ["de", "en"])
def test_a_request_overlaps_behind_whatever_context(context: str) -> None:
    """The student sees none: it would be asked what it was trained on."""
    contexts = {"de": Context(DEMO), "en": CONTEXT[""]}
    train = [example("Sky?", "t:1", context="de"), example("Demo", "t:2", context="en")]
    test = [example("Sky?", "e:1", context=context)]
    with pytest.raises(InputError, match=r"1 overlap: e:1 is t:1 \('Sky\?'\)"):
        check_disjoint({"train": train, "test": test}, contexts)


def test_a_demonstration_is_its_own_contexts() -> None:
    contexts = {"de": Context(DEMO), "en": CONTEXT[""]}
    check_disjoint({"train": [example("Demo", "t:1", context="en")]}, contexts)
    with pytest.raises(InputError, match="t:1 is demonstration 1 of the context"):
        check_disjoint({"train": [example("Demo", "t:1", context="de")]}, contexts)


def test_what_stands_before_a_prompt_makes_it_another_one() -> None:
    before = ({"role": "system", "content": "Today is Monday."},)
    dated = example("Sky?", "e:1", before=before)
    check_disjoint({"train": [example("Sky?", "t:1")], "test": [dated]}, CONTEXT)
    with pytest.raises(InputError, match="e:2 is demonstration 1 of the context"):
        check_disjoint({"test": [example("demo", "e:2", before=before)]}, {"": Context(DEMO)})


def test_a_conversation_is_a_demonstration_as_a_whole() -> None:
    """Another one may end with the same words, as "yes" does."""
    shown = [*DEMO, {"role": "user", "content": "Yes"}, {"role": "assistant", "content": "y"}]
    other = ({"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "x"})
    check_disjoint(
        {"test": [example("yes", "e:1", before=other)]}, {"": Context([*SYSTEM, *shown])}
    )
    for before in ((), tuple(DEMO)):
        with pytest.raises(InputError, match="e:2 is demonstration 2 of the context"):
            check_disjoint(
                {"test": [example("yes", "e:2", before=before)]}, {"": Context([*SYSTEM, *shown])}
            )


def test_requests_that_repeat_are_said(settings: dict) -> None:
    assert repeat_remarks([example("a", "e:1"), example("a", "e:2", context="x")]) == []
    path = settings["test_data"]
    with Path(path).open("a") as file:
        file.write('{"prompt": "owl ", "answer": "o"}\n')
    assert read_task_files(TrainConfig(**settings)).remarks == [
        "test.jsonl: 1 row repeats a request that stands above, first "
        f"{path}:5; each of them counts"
    ]


def test_equal_prompts_have_equal_answers() -> None:
    check_same_answers([example("a", "e:1", "x", "y"), example("a ", "e:2", "y", "x")])
    check_same_answers([example("Polish", "e:1", "nation"), example("polish", "e:2", "shine")])
    check_same_answers(
        [example("a", "e:1", "x", context="de"), example("a", "e:2", "y", context="en")]
    )
    with pytest.raises(InputError) as refused:
        check_same_answers([example("a", "e:1", "x"), example("a", "e:2", "y")])
    assert str(refused.value) == (
        "equal prompts must have equal answers, got 1 contradiction: e:2 ['y'] and e:1 ['x'] "
        "('a'); correct one of each, or accept both in a list"
    )


@pytest.mark.parametrize("part", ["validation_data", "test_data"])
def test_contradictions_are_found_in_a_runs_files(settings: dict, part: str) -> None:
    read_task_files(TrainConfig(**settings))
    with Path(settings[part]).open("a") as file:
        file.write('{"prompt": "kiwi", "answer": "k"}\n{"prompt": "kiwi", "answer": "w"}\n')
    with pytest.raises(InputError, match="got 1 contradiction"):
        read_task_files(TrainConfig(**settings))


def test_several_contexts_have_names_that_every_row_must_use(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Answer in German."}]
    text = json.dumps({"de": messages, "en": " Answer in English. "})
    contexts, _ = read_contexts(write(tmp_path / "c.json", text))
    assert contexts["de"] == Context(messages)
    assert contexts["en"] == Context([{"role": "system", "content": "Answer in English."}])

    def rows(*records: dict) -> dict:
        lines = "\n".join(map(json.dumps, records))
        return {"train": read_examples(write(tmp_path / "p.jsonl", lines), False, contexts)[0]}

    named = rows({"prompt": "a", "context": "de"}, {"prompt": "b", "context": "en"})
    assert [e.context for e in named["train"]] == ["de", "en"]
    check_contexts(named, contexts)
    check_contexts(rows({"prompt": "a"}), {"": Context(messages)})
    with pytest.raises(InputError, match=r'p.jsonl:2: "context" must be one of de, en, got \'\''):
        check_contexts(rows({"prompt": "a", "context": "de"}, {"prompt": "b"}), contexts)
    with pytest.raises(InputError, match=r"p.jsonl:1: \"context\" must be one of de, en, got 'fr'"):
        check_contexts(rows({"prompt": "a", "context": "fr"}), contexts)
    with pytest.raises(InputError, match=r'there must be no "context", got \'de\'; leave it out'):
        check_contexts(rows({"prompt": "a", "context": "de"}), {"": Context(messages)})
    passage = "The sky is blue by day and black at night."
    with pytest.raises(InputError, match="text that a request is about belongs into its prompt"):
        check_contexts(rows({"prompt": "a", "context": passage}), {"": Context(messages)})
    with pytest.raises(InputError, match=r'"context" must be .* got 3; leave it out where there'):
        rows({"prompt": "a", "context": 3})
