"""Whether a chat template keeps messages: each is rendered between two marks of its own."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

from opcd.errors import InputError
from opcd.scoring.reasoning import split_thought
from opcd.tasks.messages import Message, assistant, calls_of
from opcd.tasks.template import Template
from opcd.tasks.tools import FunctionCall, Tool, ToolCall

Arrange = Callable[[Sequence[Message]], list[Message]]  # messages to all that is rendered
MARKED_NUMBERS = 770_000_000  # in place of numbers that a call is given
NUMBERED = re.compile(r"zebra \d+")


def check_kept(
    template: Template,
    messages: Sequence[Message],
    arrange: Arrange,
    tools: Sequence[Tool] = (),
    answered: bool = False,  # whether the last message is rendered as the answer
) -> str:
    """Raise InputError if a message is not in the text as it is; returns the text with marks.

    Of a call that is its function's name and every argument. What a tool gave, and arguments, may
    be spelled as in JSON. Without marks the words of a dropped message could be found elsewhere.
    """
    marked = [_marked(message, i) for i, message in enumerate(messages)]
    plain = template.text(arrange(messages), answered, tools=tools)
    text = template.text(arrange(marked), answered, tools=tools)
    for message, with_marks in zip(messages, marked, strict=True):
        parts = zip(_parts(message), _parts(with_marks), strict=True)
        for (what, spellings), (_, marked_spellings) in parts:
            if _holds(plain, spellings) and _holds(text, marked_spellings):
                continue
            beside = " beside the tools" if tools else ""
            raise InputError(
                f"the chat template of {template.name!r} must keep every message{beside}, but it "
                f"drops or alters {what}; {_advice(message, text)}"
            )
    return text


def check_behind(
    template: Template,
    messages: Sequence[Message],
    arrange: Arrange,
    tools: Sequence[Tool] = (),
) -> None:
    """Raise InputError if the last message, a request's own, does not stand behind all others."""
    text = check_kept(template, messages, arrange, tools)
    *others, own = [text.index(_open(i)) for i, m in enumerate(messages) if m["content"]]
    if own < max(others, default=-1):
        raise InputError(
            f"a system message of a request's own must stand behind the context, but the chat "
            f"template of {template.name!r} puts it in front of it: "
            f"{messages[-1]['content'][:60]!r}; put it into the user's message"
        )


def behind_last(marked_text: str, number: int) -> str:
    """What `check_kept`'s text has behind the last of so many messages, marks without numbers."""
    return NUMBERED.sub("zebra", marked_text.rpartition(_close(number - 1))[2])


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """A conversation as a template may keep it: many leave the thoughts of earlier turns out."""
    return [_without_thought(m) if m["role"] == "assistant" else m for m in messages]


def _without_thought(message: Message) -> Message:
    answer, calls = split_thought(message["content"]).answer, calls_of(message)
    return assistant((answer or "") if calls else (answer or message["content"]), calls)


def _advice(message: Message, text: str) -> str:
    content = message["content"].strip()
    behind_reasoning = content.rpartition("</think>")[2].strip()
    if behind_reasoning != content and behind_reasoning in text:
        return "write that answer without its reasoning"
    another = "name a file with another template as chat_template"
    if calls_of(message):
        return f"leave out what it does not keep of that turn, or {another}"
    return another if message["role"] == "tool" else f"write it in another role, or {another}"


def _parts(message: Message) -> Iterator[tuple[str, set[str]]]:
    """What must be kept of a message, for people, and how it may be spelled."""
    content, role = message["content"].strip(), message["role"]
    if content or not calls_of(message):
        spellings = _spellings(content) if role == "tool" else {content}
        yield f"the {role} message {content[:60]!r}", spellings
    for call in calls_of(message):
        name = call["function"]["name"]
        yield f"a call of {name!r}", {name}
        for value in _leaves(call["function"]["arguments"]):
            yield f"{value!r:.60} in a call of {name!r}", _spellings(value)


def _leaves(value: Any) -> Iterator[Any]:
    """Names and single values of arguments, in their order."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _spellings(value: Any) -> set[str]:
    """A value as text: as it is, as JSON, and as Python writes it."""
    if isinstance(value, str):
        return {value, *(json.dumps(value, ensure_ascii=x)[1:-1] for x in (False, True))}
    return {json.dumps(value), str(value)}


def holds_text(text: str, part: str) -> bool:
    """Whether a text stands in another, as it is or as JSON or Python spells it."""
    return _holds(text, _spellings(part))


def _holds(text: str, spellings: set[str]) -> bool:
    return any(spelling in text for spelling in spellings)


def _open(number: int) -> str:
    return f"zebra {number} begins: "


def _close(number: int) -> str:
    return f" :ends zebra {number}"


def _between(text: str, number: int) -> str:
    return f"{_open(number)}{text}{_close(number)}"


def _marked(message: Message, number: int) -> Message:
    """A message with marks around its content, and in its calls."""
    marked = message.copy()
    if message["content"].strip():
        marked["content"] = _between(message["content"].strip(), number)
    if calls := calls_of(message):
        numbers = count(MARKED_NUMBERS + 10_000 * number)
        marked["tool_calls"] = [_marked_call(call, number, numbers) for call in calls]
    return marked


def _marked_call(call: ToolCall, number: int, numbers: Iterator[int]) -> ToolCall:
    function: FunctionCall = {
        "name": f"zebra_{number}_{next(numbers)}_{call['function']['name']}_ends",
        "arguments": _marked_value(call["function"]["arguments"], number, numbers),
    }
    marked = call.copy()
    marked["function"] = function
    return marked


def _marked_value(value: Any, number: int, numbers: Iterator[int]) -> Any:
    """Arguments with marks around texts; all else becomes a number that stands nowhere else."""
    if isinstance(value, dict):
        return {key: _marked_value(item, number, numbers) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked_value(item, number, numbers) for item in value]
    if isinstance(value, str):
        return _between(f"{next(numbers)} {value}", number)
    return next(numbers)
