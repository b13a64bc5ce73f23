"""What is thought and what is answer."""

import pytest

from opcd.scoring.reasoning import PAIRS, opened_thought, split_thought

CHANNEL = "<|channel|>"


@pytest.mark.parametrize(
    ("completion", "thought", "answer"),
    [
        ("a refund", "", "a refund"),
        ("<think>\n\n</think>\n\na refund", "", "a refund"),
        ("<think>why?</think>\n\na refund", "why?", "a refund"),
        ("why?\n</think>\na refund", "why?", "a refund"),
        ("<thinking>why?</thinking> a refund", "why?", "a refund"),
        ("[THINK]why?[/THINK]a refund", "why?", "a refund"),
        ("<think>one</think>so<think>two</think>a refund", "one</think>so<think>two", "a refund"),
        ("<think>a refund", "<think>a refund", None),
        ("<think>one</think> <think>two", "<think>one</think> <think>two", None),
        (f"{CHANNEL}final<|message|>a refund", "", "a refund"),
        (f"{CHANNEL}analysis<|message|>why?", f"{CHANNEL}analysis<|message|>why?", None),
        (
            f"{CHANNEL}analysis<|message|>why?assistant{CHANNEL}final json<|message|>[1]",
            "analysis<|message|>why?assistant",
            "[1]",
        ),
        *((f"{opens}why?{closes}\na refund", "why?", "a refund") for opens, closes in PAIRS),
        *((f"{opens}a refund", f"{opens}a refund", None) for opens, _ in PAIRS),
        ("", "", ""),
    ],
)
def test_a_completion_is_cut(completion: str, thought: str, answer: str | None) -> None:
    assert split_thought(completion) == (thought, answer)


def test_a_thought_that_the_prompt_opens() -> None:
    assert opened_thought("<|assistant|>\n<think>\n") == "<think>\n"
    assert opened_thought("<|assistant|>\n<think>\n\n</think>\n\n") == ""
    assert opened_thought("say <think>\n<|assistant|>\n") == ""
