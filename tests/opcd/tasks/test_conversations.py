"""Whole conversations, from their file to what is trained on; and what is refused before that."""

import json
from pathlib import Path
from typing import Any

import pytest

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.messages import assistant, user
from opcd.tasks.prepare import prepare
from tests.conftest import CHATML, tiny_llama, tiny_tokenizer, write_jsonl
from tests.opcd.tasks.templates import TOOL_FAMILIES
from tests.opcd.tasks.test_tool_templates import CONTEXT, RAIN, TOOL

GOOD = {"messages": [*RAIN, assistant("Wind.")]}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"name": "weather", "arguments": "{Bonn"}],
}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}


@pytest.fixture
def tooled(settings: dict, tmp_path: Path) -> dict:
    """A context with tools, and a template that writes them."""
    tiny_llama(max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    tiny_tokenizer(TOOL_FAMILIES["Qwen2.5"].template).save_pretrained(tmp_path / "model")
    context = tmp_path / "context.json"
    context.write_text(json.dumps({"messages": CONTEXT, "tools": [TOOL]}), encoding="utf-8")
    return settings | {"model": str(tmp_path / "model"), "context": str(context)}


BAD: dict[str, tuple[dict, str]] = {
    "a call that is no JSON": (
        {"messages": [RAIN[0], CALL, RAIN[2], assistant("Yes.")]},
        "message 1: call 0: the arguments of 'weather' must be JSON, got '{Bonn'",
    ),
    "a result without a call": (
        {"messages": [RAIN[0], RAIN[2], assistant("Yes.")]},
        "message 1 must answer a call of the assistant's turn in front of it, got the result of a",
    ),
    "a turn of another role": (
        {"messages": [*RAIN, {"role": "narrator", "content": "So."}]},
        "the role of message 5 must be one of system, developer, user, assistant, tool, function",
    ),
    "schemas of a row's own": (
        GOOD | {"tools": [TOOL | {"function": TOOL["function"] | {"name": "other"}}]},
        "the tools of a row must be its context's, got other where the context has weather",
    ),
    "an assistant turn first": (
        {"messages": [assistant("Hello."), *RAIN, assistant("Wind.")]},
        "a conversation with tools must begin with a user message, got the assistant's as message",
    ),
    "an assistant turn first, without calls": (
        {"messages": [assistant("Hello."), user("Hm?"), assistant("So.")]},
        "a request behind a context with tools must begin with a user message",
    ),
    "an empty turn": (
        {"messages": [user("Hm?"), assistant(" "), user("So?"), assistant("Yes.")]},
        "the content of message 1 must be a non-empty string, got ' '",
    ),
    "an empty turn of the user's": (
        {"messages": [user("Hm?"), assistant("Yes."), user(""), assistant("Yes.")]},
        "the content of message 2 must be a non-empty string, got ''",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [PICTURE]}, assistant("A cat.")]},
        "the content of message 0 must be text, got a part of type 'image_url'; images, sounds and",
    ),
    "a sound behind text": (
        {
            "messages": [
                user("Hm?"),
                assistant("Yes."),
                {"role": "user", "content": [{"type": "text", "text": "So?"}, SOUND]},
                assistant("No."),
            ]
        },
        "the content of message 2 must be text, got a part of type 'input_audio'; images, sounds",
    ),
    "images in a column": (
        GOOD | {"images": ["a.png"]},
        'a row must be text, got "images", and images and sounds are not supported; leave that row',
    ),
    "audio in a column": (
        GOOD | {"audio": {"path": "a.wav"}},
        'a row must be text, got "audio", and images and sounds are not supported; leave that row',
    ),
}


def refused(settings: dict, monkeypatch: pytest.MonkeyPatch, **overrides: Any) -> str:
    monkeypatch.setattr("opcd.tasks.prepare.load_model", None)  # it must not be called
    with pytest.raises(InputError) as found:
        prepare(TrainConfig(**settings | overrides), for_training=True)
    return str(found.value)


@pytest.mark.parametrize("kind", [{"turns": "all"}, {"source": "recorded"}], ids=str)
@pytest.mark.parametrize("case", BAD)
def test_what_is_refused_before_weights_are_loaded(
    tooled: dict, monkeypatch: pytest.MonkeyPatch, case: str, kind: dict
) -> None:
    """With file and line."""
    given, message = BAD[case]
    write_jsonl(Path(tooled["prompts"]), [GOOD, given, GOOD])
    said = refused(tooled, monkeypatch, **kind)
    assert said.startswith(f"{tooled['prompts']}:2: {message}")
    assert ";" in said, "what to do"


@pytest.mark.parametrize("part", ["validation_data", "test_data"])
def test_measuring_data_are_refused_in_the_same_way(
    tooled: dict, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    given, message = BAD["a result without a call"]
    write_jsonl(Path(tooled[part]), [GOOD, given])
    assert refused(tooled, monkeypatch).startswith(f"{tooled[part]}:2: {message}")


def test_schemas_that_the_template_ignores(tooled: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_tokenizer(CHATML).save_pretrained(tooled["model"])
    said = refused(tooled, monkeypatch)
    assert said.startswith(f"{tooled['context']}: the chat template of ")
    assert "must write the context's tools, but its text is the same without them; name" in said


def test_rows_of_several_lengths_and_kinds(tooled: dict) -> None:
    """A word and a conversation with calls, in forms of several houses, in one file."""
    sharegpt = [
        {"from": "human", "value": "Rain in Bonn?"},
        {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Bonn"}}'},
        {"from": "observation", "value": "no"},
        {"from": "gpt", "value": "No."},
    ]
    rows = [
        {"prompt": "red"},
        GOOD,
        {"conversations": sharegpt},
        {"instruction": "Add.", "input": "3 + 4", "output": "7"},
        {"prompt": [user("Hi"), assistant("Hello."), user("Red?")], "completion": "r"},
        GOOD
        | {"messages": [user("Long? " + "word " * 60), *GOOD["messages"][1:]], "tools": [TOOL]},
    ]
    write_jsonl(Path(tooled["prompts"]), rows)
    task = prepare(TrainConfig(**tooled | {"turns": "all"}), for_training=True).task
    assert [len(row) for row in task.conversations] == [1, 3, 2, 1, 2, 3]
    write_jsonl(Path(tooled["prompts"]), rows[1:])
    conversations = prepare(
        TrainConfig(**tooled | {"source": "recorded"}), for_training=True
    ).task.recorded
    assert [[len(e.spans) for e in found] for found in conversations] == [[3], [2], [1], [2], [3]]
