"""What both models are given, beside what transformers makes of the messages."""

import json
from pathlib import Path

import pytest

import opcd.preflight.rendering as renderings
from opcd.config import TrainConfig
from opcd.models.by_name import load_tokenizer
from opcd.preflight.rendering import rendering, rendering_lines
from opcd.tasks.prepare import Setup, prepare


@pytest.fixture
def setup(settings: dict) -> Setup:
    return prepare(TrainConfig(**settings))


def test_prompts_that_are_not_the_tokenizers_own_are_named(setup: Setup) -> None:
    assert not rendering(setup, setup.task.test).differing
    case = setup.task.test[1]
    case.prompt.teacher_ids.append(3)
    found = rendering(setup, setup.task.test)
    assert found.differing == [f"{case.source}: the teacher's prompt"]
    assert "not what the tokenizer's own apply_chat_template writes" in rendering_lines(found)[-1]


def test_prompts_are_rendered_by_one_tokenizer_of_their_own(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(
        renderings, "load_tokenizer", lambda name: loaded.append(name) or load_tokenizer(name)
    )
    setup.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    found = rendering(setup, setup.task.test)
    assert found.compared == len(setup.task.test)
    assert not found.differing
    assert loaded == [setup.config.model]


def test_the_place_of_the_context_is_marked(setup: Setup) -> None:
    lines = rendering_lines(rendering(setup, setup.task.test))
    assert lines[0].endswith(
        "tokens: '<|im_start|>system\\n' [the context: 'Answer with one letter.'] "
        "'<|im_end|>\\n<|im_start|>user\\ncat<|im_end|>\\n<|im_start|>assistant\\n'"
    )
    assert lines[1] == (
        "student   sees 22 tokens: '<|im_start|>user\\ncat<|im_end|>\\n<|im_start|>assistant\\n'"
    )


def test_a_long_context_is_shortened_and_its_request_is_not(settings: dict) -> None:
    messages = [
        {"role": "system", "content": " Sort. " + "long " * 60},
        {"role": "user", "content": "a" * 70},
        {"role": "assistant", "content": "fin"},
    ]
    Path(settings["context"]).unlink()
    settings |= {"context": settings["context"].replace(".md", ".json")}
    Path(settings["context"]).write_text(json.dumps(messages))
    setup = prepare(TrainConfig(**settings))
    found = rendering(setup, setup.task.test)
    assert found.context is not None
    begin, end = found.context
    assert found.teacher[begin:end].startswith("Sort. long")
    assert found.teacher[begin:end].endswith("assistant\nfin")
    line = rendering_lines(found)[0]
    assert f"[the context: 'Sort. {'long ' * 34}long' … '" in line
    assert "assistant\\nfin'] " in line
    assert "cat<|im_end|>" in line


def test_a_context_that_is_not_found_is_not_marked(setup: Setup) -> None:
    chat = setup.chats[""]
    chat.context = [chat.context[0] | {"content": "Another."}]
    found = rendering(setup, setup.task.test)
    assert found.context is None
    assert "the context" not in rendering_lines(found)[0]
