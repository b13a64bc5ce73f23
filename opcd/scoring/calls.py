"""Calls of tools in what a model writes, whatever marks its family puts around them."""

import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from opcd.runtime.strict_json import NO_JSON
from opcd.scoring.reasoning import split_thought
from opcd.scoring.values import DECODER, comparable, read_value

# Where the name stands in front of the arguments and not among them. The others write an object
# with both: Qwen and Hermes <tool_call>{...}</tool_call>, Llama 3 {"name", "parameters"}, Granite
# and Mistral a list of them.
_NAMES = (
    r"<function=([\w.-]+)>\s*",  # Llama 3, with tools of the user's
    r"\[TOOL_CALLS\]\s*([\w.-]+)(?:\[CALL_ID\]\w+)?\[ARGS\]\s*",  # Mistral since Magistral
    r"<｜tool▁sep｜>([\w.-]+)\s*```json\s*",  # DeepSeek V3 and R1
    r"<｜tool▁call▁begin｜>([\w.-]+)<｜tool▁sep｜>\s*",  # DeepSeek V3.1
)
_NAMED = re.compile(rf"(?:{'|'.join(_NAMES)})\Z")
_LONGEST_NAME = 200  # characters in front of an object that are looked at for its name
_ARGUMENTS = ("arguments", "parameters")
# In front of each call, or of all; also of families whose calls are not read.
_MARKS = re.compile(
    r"<tool_call>|\[TOOL_CALLS\]|<function=|<\|python_tag\|>|<\|tool_call(?:_begin|_start)?\|>"
    r"|<｜tool▁call▁begin｜>"
)


class Call(NamedTuple):
    """One call; arguments are data, with no order among them."""

    name: str
    arguments: Any  # a dict, comparable


def calls_in(text: str) -> list[Call]:
    """The calls that a completion makes, in their order; what stands around them is no matter.

    A call that is no JSON is none.
    """
    found: list[Call] = []
    text = unicodedata.normalize("NFC", text)
    for start, value in _values(text):
        front = text[max(0, start - _LONGEST_NAME) : start]
        named = _NAMED.search(front)
        if named and isinstance(value, dict):
            name = next(filter(None, named.groups()))
            found.append(Call(name, comparable(value)))
        else:
            found += _calls_of(value)
    return found


def accepted_calls(text: str) -> list[Call]:
    """The calls of an accepted answer: JSON of one or of a list, or as a completion makes them,
    with whatever stands around; text without any is an answer without.

    Raises ValueError for JSON that is no call, and for marks of more calls than can be read.
    """
    text = (split_thought(text).answer or "").strip()
    marks = _MARKS.findall(text)
    if text.startswith(("{", "[")) and not text.startswith(tuple(marks)):
        return _calls_alone(text)
    found = calls_in(text)
    if len(marks) > len(found):
        raise ValueError(f"no call that can be read, behind {marks[len(found)]}")
    return found


def _calls_alone(text: str) -> list[Call]:
    """The calls of JSON with nothing around. Raises ValueError for what is none."""
    try:
        read_value(text)
    except NO_JSON as error:
        raise ValueError(f"no JSON: {error}") from error
    value = next(value for _, value in _values(text))
    calls = _calls_of(value)
    if not calls or len(calls) != (len(value) if isinstance(value, list) else 1):
        raise ValueError("no call")
    return calls


def same_calls(one: list[Call], other: list[Call]) -> bool:
    """Whether both hold the same calls, in whatever order: parallel calls have none."""
    rest = list(other)
    for call in one:
        if call not in rest:
            return False
        rest.remove(call)
    return not rest


def _values(text: str) -> Iterator[tuple[int, Any]]:
    """Every JSON object and list in a text that is in no other, and where it begins."""
    at = 0
    while begins := re.compile(r"[{\[]").search(text, at):
        at = begins.start()
        try:
            value, end = DECODER.raw_decode(text, at)
        except NO_JSON:
            at += 1
            continue
        yield at, value
        at = end


def _calls_of(value: Any) -> list[Call]:
    """The calls that a JSON value spells: {"name", "arguments"}, one inside "function", a list.

    With a description it is a schema that is quoted.
    """
    if isinstance(value, list):
        return [call for item in value for call in _calls_of(item)]
    if not isinstance(value, dict):
        return []
    if isinstance(value.get("function"), dict):
        return _calls_of(value["function"])
    given = [value[key] for key in _ARGUMENTS if key in value]
    if not isinstance(value.get("name"), str) or len(given) != 1 or "description" in value:
        return []
    arguments = given[0]
    if isinstance(arguments, str):  # as OpenAI's interface spells them
        try:
            arguments = DECODER.decode(arguments)
        except NO_JSON:
            return []
    if not isinstance(arguments, dict):
        return []
    return [Call(comparable(value["name"]), comparable(arguments))]
