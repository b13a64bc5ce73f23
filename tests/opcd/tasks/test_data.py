"""Reading contexts and prompts: what is accepted, and what each mistake is told."""

import json
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.tasks.data import Example, check_contexts, check_disjoint, read_contexts, read_examples


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_text_file_is_one_system_message(tmp_path: Path) -> None:
    assert read_contexts(write(tmp_path / "c.md", " Be brief.\n"))[""] == [
        {"role": "system", "content": "Be brief."}
    ]


def test_a_json_file_is_a_list_of_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    assert read_contexts(write(tmp_path / "c.json", json.dumps(messages))) == {"": messages}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", " \n", "must not be empty"),
        ("c.pdf", "x", r"\.txt, \.md"),
        ("c.json", "[{", "c.json:1: context must be valid JSON"),
        ("c.json", "{}", "a name each"),
        ("c.json", '{" ": "x"}', "a name each"),
        ("c.json", '{"a": "x", "a": "y"}', "stands twice"),
        ("c.json", '{"a": "x", "b": " "}', r"c\.json: b: must be a non-empty list"),
        ("c.json", "[]", "non-empty list"),
        ("c.json", '[{"role": "robot", "content": "x"}]', "'robot'"),
        ("c.json", '[{"role": "user"}]', "message 0 must be"),
        ("c.json", '[{"role": "system", "content": " "}]', "non-empty string"),
        ("c.json", '[{"role": "user", "content": "x"}]', "must end with"),
        (
            "c.json",
            '[{"role": "assistant", "content": "x"}, {"role": "system", "content": "x"}]',
            "must come first",
        ),
    ],
)
def test_contexts_that_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_contexts(write(tmp_path / name, text))


def test_missing_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not there"):
        read_contexts(str(tmp_path / "none.txt"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_contexts(str(tmp_path / "latin.txt"))


def test_prompts_and_messages_and_answers(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl",
        '{"prompt": "a", "answer": "x"}\n\n'
        '{"messages": [{"role": "user", "content": "b"}], "answer": ["y", "z"]}\n',
    )
    first, second = read_examples(path, answers_required=True)
    assert (first.text, first.answers, first.source) == ("a", ("x",), f"{path}:1")
    assert (second.text, second.answers, second.source) == ("b", ("y", "z"), f"{path}:3")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", ":2: each line must be one JSON object"),
        ("[1]", ":2: must be an object"),
        ('{"text": "a"}', 'either "prompt" or "messages"'),
        ('{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        ('{"prompt": ""}', "non-empty string"),
        ('{"prompt": 3}', "non-empty string"),
        (r'{"prompt": "a \ud800 b"}', "lone surrogate"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "'tool'"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "last message must be the user"),
        (
            '{"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]}',
            "must not carry a system message",
        ),
        ('{"prompt": "a", "answer": 3}', "string or a list"),
        ('{"prompt": "a"}', 'needs "answer"'),
        ('{"prompt": "a", "prompt": "b"}', "stands twice"),
        ('{"prompt": "a", "answer": " "}', "must not be blank"),
    ],
)
def test_lines_that_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "ok", "answer": "x"}\n' + line + "\n")
    with pytest.raises(InputError, match=message):
        read_examples(path, answers_required=True)


def test_line_separators_inside_a_string_do_not_end_the_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", '{"prompt": "a\u2028b"}\n{"prompt": "c"}\n')
    assert [e.text for e in read_examples(path, answers_required=False)] == ["a\u2028b", "c"]


def example(text: str, source: str) -> Example:
    return Example(({"role": "user", "content": text},), (), source)


def test_prompts_in_two_parts_or_in_the_context_are_refused() -> None:
    context = [{"role": "user", "content": "Demo"}, {"role": "assistant", "content": "x"}]
    train, test = example("Hello  there", "t:1"), example("hello there", "e:1")
    check_disjoint({"train": [train, train], "test": []}, {"": context})
    with pytest.raises(InputError, match=r"e:1.*also at t:1"):
        check_disjoint({"train": [train], "test": [test]}, {"": context})
    with pytest.raises(InputError, match="demonstration of the context"):
        check_disjoint({"train": [example("demo", "t:2")]}, {"": context})


def test_several_contexts_have_names_that_every_row_must_use(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Answer in German."}]
    text = json.dumps({"de": messages, "en": " Answer in English. "})
    contexts = read_contexts(write(tmp_path / "c.json", text))
    assert contexts["de"] == messages
    assert contexts["en"] == [{"role": "system", "content": "Answer in English."}]

    def rows(*records: dict) -> dict:
        lines = "\n".join(map(json.dumps, records))
        return {"train": read_examples(write(tmp_path / "p.jsonl", lines), False)}

    named = rows({"prompt": "a", "context": "de"}, {"prompt": "b", "context": "en"})
    assert [e.context for e in named["train"]] == ["de", "en"]
    check_contexts(named, contexts)
    check_contexts(rows({"prompt": "a"}), {"": messages})
    with pytest.raises(InputError, match=r'p.jsonl:2: "context" must be one of de, en, got \'\''):
        check_contexts(rows({"prompt": "a", "context": "de"}, {"prompt": "b"}), contexts)
    with pytest.raises(InputError, match=r"p.jsonl:1: \"context\" must be one of de, en, got 'fr'"):
        check_contexts(rows({"prompt": "a", "context": "fr"}), contexts)
    with pytest.raises(InputError, match=r'there must be no "context", got \'de\'; leave it out'):
        check_contexts(rows({"prompt": "a", "context": "de"}), {"": messages})
    with pytest.raises(InputError, match=r'"context" must be the name of one, got 3'):
        rows({"prompt": "a", "context": 3})
