"""Reading contexts: what is accepted, and what each mistake is told."""

import json
from pathlib import Path

import pytest

from opcd.errors import InputError
from opcd.tasks.contexts import Context, read_contexts


def write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8", newline="")
    return str(path)


def test_a_text_file_is_one_system_message(tmp_path: Path) -> None:
    assert read_contexts(write(tmp_path / "c.md", " Be brief.\r\nAnd kind.\n")) == (
        {"": Context([{"role": "system", "content": "Be brief.\nAnd kind."}])},
        [],
    )


def test_a_json_file_is_a_list_of_messages(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    path = write(tmp_path / "c.json", json.dumps(messages))
    assert read_contexts(path) == ({"": Context(messages)}, [])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.txt", " \n", "must not be empty"),
        ("c.pdf", "x", r"\.txt, \.md"),
        ("c.json", "[{", "c.json:1: context must be valid JSON"),
        ("c.json", "{}", "a name each"),
        ("c.json", '{" ": "x"}', "a name each"),
        ("c.json", '{"a": "x", "a": "y"}', "stands twice"),
        ("c.json", '{"a": "pirate.md"}', "c.json: a: a context must be the text itself"),
        ("c.json", r'{"a": "C:\Users"}', r'write a backslash as "\\\\", in a path also as "/"'),
        (
            "c.json",
            '{"model": "m", "instructions": "One word.", "input": "Sky?"}',
            'a request must have "messages", got input, instructions, model',
        ),
        ("c.json", "[" * 100000, "c.json:1: context must be valid JSON"),
        ("c.json", '{"messages": [{"role": "user", "content": "Hi"}]}', "more than the request"),
        (
            "c.json",
            '{"messages": [{"role": "system", "content": "x"}], "tools": [{"type": "function"}]}',
            'c.json: "tools": tool 0: "name" must be that of a function, text .*, got None; ',
        ),
        (
            "c.json",
            '{"system": "One word.", "user": "Sky?"}',
            "names of their own, got system, user, as parts of one are called; write one as",
        ),
        ("c.json", '{"system": "One word.", "bank": "Be kind."}', "got system, .* or rename"),
        ("c.json", '{"messages": "One word."}', "names of their own, got messages,"),
        ("c.json", '{"conversations": [{"from": "system", "value": "x"}]}', "got conversations,"),
        ("c.json", '{"System Prompt": "One word."}', "names of their own, got System Prompt,"),
        ("c.json", '{"text": "One word."}', "got text, as parts"),
        ("c.json", '{"name": "Ann", "description": "Be kind."}', "got description, name, as parts"),
        ("c.json", '{"instruction": "Be kind.", "output": "x"}', "got instruction, output, as"),
        (
            "c.md",
            '[{"role": "system", "content": "Be kind."}]',
            "c.md: a text file must be one system message, got JSON with chat messages; name the "
            "file .json",
        ),
        ("c.txt", '{"messages": [{"role": "user", "content": "Hi"}]}', "name the file .json"),
        ("c.txt", '{"bank": [{"from": "system", "value": "x"}]}', "name the file .json"),
        ("c.md", '{"role": "system", "content": "Be kind."}', "name the file .json"),
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
    with pytest.raises(InputError, match="got the folder"):
        read_contexts(str(tmp_path))
    (tmp_path / "c.docx").write_bytes(b"PK\x03\x04\xff")
    with pytest.raises(InputError, match=r"context must be a .txt, .md .*c.docx'; rename or conv"):
        read_contexts(str(tmp_path / "c.docx"))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="UTF-8"):
        read_contexts(str(tmp_path / "latin.txt"))


SYSTEM = {"role": "system", "content": "One word."}
DEMONSTRATION = [{"role": "user", "content": "Sky?"}, {"role": "assistant", "content": "Blue"}]


def test_the_body_of_a_request(tmp_path: Path) -> None:
    """Its last user message is the request."""
    messages = [SYSTEM | {"role": "developer"}, *DEMONSTRATION]
    body = {"model": "m", "messages": messages, "temperature": 0, "tool_choice": "none"}
    path = write(tmp_path / "c.json", json.dumps(body))
    assert read_contexts(path) == (
        {"": Context([SYSTEM, *DEMONSTRATION])},
        ["c.json: settings left out: model, temperature, tool_choice"],
    )
    body = {"messages": [*messages, {"role": "user", "content": "Grass?"}]}
    assert read_contexts(write(tmp_path / "c.json", json.dumps(body))) == (
        {"": Context([SYSTEM, *DEMONSTRATION])},
        ["c.json: the last user message is the request and was left out"],
    )
    parts = [{"type": "text", "text": "One word.", "cache_control": {"type": "ephemeral"}}]
    body = {"model": "m", "system": parts, "messages": [*DEMONSTRATION]}
    assert read_contexts(write(tmp_path / "c.json", json.dumps(body))) == (
        {"": Context([SYSTEM, *DEMONSTRATION])},
        ["c.json: settings left out: model; text parts joined by line breaks"],
    )
    body = {"messages": [SYSTEM]}
    path = write(tmp_path / "c.json", json.dumps(body))
    assert read_contexts(path) == ({"": Context([SYSTEM])}, [])


def test_contexts_are_named_for_people(tmp_path: Path) -> None:
    """Words of one's own may be JSON; what was taken for a name is said."""
    assert read_contexts(write(tmp_path / "c.md", '{"role": "a clerk", "tone": "kind"}'))[1] == []
    path = write(tmp_path / "c.json", json.dumps({f"shop {i}": "Be kind." for i in range(9)}))
    assert read_contexts(path)[1] == [
        "c.json: 9 contexts, which rows name: shop 0, shop 1, shop 2, shop 3, shop 4, shop 5, "
        "shop 6, shop 7, ..."
    ]


def test_text_parts_of_a_context(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "word."}]
    path = write(tmp_path / "c.json", json.dumps({"a": [SYSTEM | {"content": parts}]}))
    assert read_contexts(path) == (
        {"a": Context([{"role": "system", "content": "One\nword."}])},
        [
            "c.json: 1 context, which rows name: a",
            "c.json: a: text parts joined by line breaks",
        ],
    )
