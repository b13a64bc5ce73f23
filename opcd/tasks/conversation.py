"""A conversation as a whole: what tools give stands behind the calls that it answers."""

from collections.abc import Sequence
from typing import Any

from opcd.errors import InputError
from opcd.tasks.messages import (
    Conversation,
    Message,
    calls_of,
    is_learned,
    is_tool_turn,
    read_messages,
)
from opcd.tasks.tools import ToolCall


def read_conversation(value: Any, source: str) -> Conversation:
    """Messages in any form of `messages`, whose calls and results belong together.

    Each result answers a call of the assistant's turns directly in front of it: the one of its id
    where both have one, else the next of its name, or the next. Every call has its result before
    anyone else speaks; only the last message may call without one, as an answer does.

    Raises InputError, which names the message, where that is not so, and for a conversation with
    tools that the user does not begin.
    """
    conversation = read_messages(value, source)
    if any(map(is_tool_turn, conversation.messages)):
        check_results(conversation.messages, source)
    return conversation


def answering_turns(messages: Sequence[Message], source: str) -> list[int]:
    """Which messages are assistant turns that answer the user, or go on behind a tool's result.

    A turn that nothing but a system message stands in front of answers nothing: it is history.

    Raises InputError for a turn behind another one, which no model writes.
    """
    found = []
    for i, message in enumerate(messages):
        before = messages[i - 1]["role"] if i else "system"
        if message["role"] != "assistant" or before == "system":
            continue
        if before == "assistant":
            raise InputError(
                f"{source}: each assistant turn must answer a user's message or what a tool gave, "
                f"got message {i} behind another assistant turn; merge both into one"
            )
        found.append(i)
    return found


def learned_turns(messages: Sequence[Message], source: str) -> list[int]:
    """Those of the answering turns that are trained on as they were recorded: all but those of
    weight 0, which are history. Raises InputError as `answering_turns`."""
    return [i for i in answering_turns(messages, source) if is_learned(messages[i])]


def check_results(messages: Sequence[Message], source: str) -> None:
    """Raise InputError where calls and results do not belong together, see `read_conversation`."""
    turns = [i for i, m in enumerate(messages) if m["role"] != "system"]
    if len(turns) > 1 and messages[turns[0]]["role"] == "assistant":
        raise InputError(
            f"{source}: a conversation with tools must begin with a user message, got the "
            f"assistant's as message {turns[0]}; remove it, or write what it answers"
        )
    waiting: list[tuple[int, ToolCall]] = []  # calls without a result yet, each with its message
    answered = False  # some of the turns' calls have one
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            waiting.pop(_answered_by(message, i, waiting, source))
            answered = True
            continue
        if waiting and (answered or message["role"] != "assistant"):
            raise _without_result(waiting[0], source, f"before message {i}")
        answered = False
        calls = calls_of(message)
        waiting += [(i, call) for call in calls]
        _check_ids(waiting, source)
    if waiting and (answered or waiting[0][0] < len(messages) - 1):
        raise _without_result(waiting[0], source, "before the model goes on")


def _answered_by(
    result: Message, i: int, waiting: Sequence[tuple[int, ToolCall]], source: str
) -> int:
    """Which of the waiting calls a result answers. Raises InputError where there is none."""
    if not waiting:
        raise InputError(
            f"{source}: message {i} must answer a call of the assistant's turn in front of it, got "
            f"the result of a tool that no call is left for; remove it, or add the call"
        )
    number, name = result.get("tool_call_id"), result.get("name")
    ids = [call.get("id") for _, call in waiting]
    names = [call["function"]["name"] for _, call in waiting]
    fitting = list(range(len(waiting)))
    if number is not None:
        fitting = [k for k in fitting if ids[k] == number] or [k for k in fitting if ids[k] is None]
    if not fitting:
        raise InputError(
            f"{source}: message {i} must answer a call of the assistant's turn in front of it, got "
            f"the id {number!r} where {', '.join(map(repr, ids))} wait; correct it"
        )
    named = [k for k in fitting if name in (None, names[k])]
    if not named:
        called = ", ".join(names[k] for k in fitting)
        raise InputError(
            f"{source}: message {i} must answer a call of the assistant's turn in front of it, got "
            f"what {name!r} gave where {called} was called; correct it"
        )
    return named[0]


def _check_ids(waiting: Sequence[tuple[int, ToolCall]], source: str) -> None:
    ids = [call["id"] for _, call in waiting if "id" in call]
    if len(set(ids)) < len(ids):
        raise InputError(
            f"{source}: calls must have an id each, got {max(ids, key=ids.count)!r} twice in "
            f"message {waiting[-1][0]}; correct one"
        )


def _without_result(call: tuple[int, ToolCall], source: str, when: str) -> InputError:
    i, called = call
    return InputError(
        f"{source}: every call must have its result {when}, got none for the call of "
        f"{called['function']['name']!r} in message {i}; add a message of the role tool, or remove "
        f"the call"
    )
