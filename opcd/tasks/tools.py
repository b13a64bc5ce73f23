"""Tools as people write them: the schemas that a context offers, and the calls of a message."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from opcd.errors import InputError
from opcd.runtime.strict_json import NO_JSON, strict_decoder

Tool = dict[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

SCHEMAS = ("tools", "functions")  # where requests have them; the second as OpenAI once did
CHOICES = ("tool_choice", "function_call")  # which tool a request wants called
CALL = '{"name": ..., "arguments": {...}}'
SCHEMA = '{"type": "function", "function": {"name": ..., "description": ..., "parameters": {...}}}'


class FunctionCall(TypedDict):
    """What is called, and with what."""

    name: str
    arguments: dict[str, Any]  # plain JSON values


class _Call(TypedDict):
    type: str  # "function"
    function: FunctionCall


class ToolCall(_Call, total=False):
    """A call, as chat templates are given it."""

    id: str


def schemas_in(given: Mapping[str, Any], source: str) -> list[Tool]:
    """The tools of a request, or of a row; [] where there are none.

    Raises InputError for schemas that are none, and for a request that says which tool is called,
    or that none is: a chat template writes nothing of that. "auto" means nothing, and so does
    "none" where there are no tools.
    """
    found = [name for name in SCHEMAS if given.get(name) and given[name] != "[]"]
    if len(found) > 1:
        raise InputError(
            f'{source}: tools must stand in one place, got "tools" and "functions"; remove one'
        )
    if given.get("tool_calls"):
        raise InputError(
            f'{source}: "tool_calls" must stand in the message that calls, got them beside the '
            f"messages; put them into it"
        )
    for name in CHOICES:
        choice = given.get(name)
        if choice and choice != "auto" and (found or choice != "none"):
            raise InputError(
                f'{source}: "{name}" must be "auto", got {str(choice)[:60]!r}, which the models '
                f"would not see: whether and what they call is theirs to say; remove it"
            )
    return read_schemas(given[found[0]], f'{source}: "{found[0]}"') if found else []


def read_schemas(value: Any, place: str) -> list[Tool]:
    """Tools in OpenAI's form, from that or from bare functions, or from either as JSON text.

    What a function has is kept in its order. Raises InputError that begins with the place.
    """
    value = _parsed(value, place) if isinstance(value, str) else value
    if not isinstance(value, list) or not value:
        raise InputError(f"{place} must be a list of tools like {SCHEMA}, got {value!r:.80}")
    tools = [_read_schema(given, f"{place}: tool {i}") for i, given in enumerate(value)]
    names = names_of(tools)
    for i, name in enumerate(names):
        if name in names[:i]:
            raise InputError(
                f"{place}: tools must have a name each, got {name!r} for tool {names.index(name)} "
                f"and tool {i}; rename or remove one"
            )
    return tools


def names_of(tools: Sequence[Tool]) -> list[str]:
    """What the tools are called."""
    return [tool["function"]["name"] for tool in tools]


def arguments_of(tools: Sequence[Tool]) -> list[tuple[str, str]]:
    """The names of the arguments that the tools' schemas list, each behind its tool's name."""
    found = []
    for tool in tools:
        listed = tool["function"].get("parameters", {}).get("properties")
        names = listed if isinstance(listed, dict) else ()
        found += [(tool["function"]["name"], name) for name in names]
    return found


def read_calls(value: Any, place: str) -> list[ToolCall]:
    """The calls of a message: OpenAI's, or each ``{"name", "arguments"}`` alone.

    Arguments are an object, or the JSON text of one. Raises InputError that begins with the place.
    """
    if not isinstance(value, list):
        raise InputError(f"{place} must have a list of calls, got {value!r:.80}")
    return [_read_call(given, f"{place}: call {i}") for i, given in enumerate(value)]


def read_calls_text(text: Any, place: str) -> list[ToolCall]:
    """The calls of ShareGPT's function_call turn: the JSON text of one, or of a list of them."""
    value = _parsed(text, place) if isinstance(text, str) else text
    return read_calls(value if isinstance(value, list) else [value], place)


def calls_text(calls: Sequence[ToolCall]) -> str:
    """Calls as canonical JSON: ``{"name": ..., "arguments": {...}}``, a list of several.

    Keys of arguments are sorted, ids left out: equal calls are equal texts.
    """
    texts = [
        f'{{"name": {json.dumps(function["name"], ensure_ascii=False)}, "arguments": '
        f"{json.dumps(function['arguments'], ensure_ascii=False, sort_keys=True)}}}"
        for function in (call["function"] for call in calls)
    ]
    return texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"


def _read_schema(given: Any, place: str) -> Tool:
    wrapped = isinstance(given, dict) and isinstance(given.get("function"), dict)
    function = given["function"] if wrapped else given
    if not isinstance(function, dict):
        raise InputError(f"{place} must be like {SCHEMA}, got {given!r:.80}")
    if (kind := given.get("type", "function")) != "function":
        raise InputError(
            f"{place} must be a function, got type {kind!r:.60}, which has no schema for a chat "
            f"template; remove it"
        )
    if wrapped and (others := sorted(set(given) - {"type", "function"})):
        raise InputError(
            f'{place} must have nothing beside "type" and "function", got {", ".join(others)}; put '
            f"it into the function, or remove it"
        )
    function = {
        key: value
        for key, value in function.items()
        if value is not None and (wrapped or key != "type")
    }
    _check_name(function.get("name"), place)
    if not isinstance(function.get("description", ""), str):
        raise InputError(
            f'{place}: "description" must be text, got {function["description"]!r:.80}; correct it'
        )
    if not isinstance(function.get("parameters", {}), dict):
        raise InputError(
            f'{place}: "parameters" must be a JSON schema, an object, got '
            f"{function['parameters']!r:.80}; correct it"
        )
    if "input_schema" in function:
        raise InputError(
            f'{place} must have its schema as "parameters", got "input_schema"; rename it'
        )
    return {"type": "function", "function": _plain(function, place)}


def _read_call(given: Any, place: str) -> ToolCall:
    wrapped = isinstance(given, dict) and "function" in given
    function = given["function"] if wrapped else given
    if not isinstance(function, dict) or not {"name", "arguments"} <= set(function):
        raise InputError(
            f"{place} must be {CALL}, got {given!r:.80}; correct it ({{}} where it takes none)"
        )
    if (kind := given.get("type", "function")) != "function":
        raise InputError(f"{place} must be of a function, got type {kind!r:.60}; remove it")
    around = {"type", "id", "index", *(("function",) if wrapped else ("name", "arguments"))}
    others = {key for key in set(given) - around if given[key] is not None}
    if wrapped:
        others |= set(function) - {"name", "arguments"}
    if others:
        raise InputError(
            f"{place} must be {CALL} with an id at most, got {', '.join(sorted(others))}, which "
            f"the models would not see; remove it"
        )
    _check_name(function["name"], place)
    arguments = function["arguments"]
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"{place}: the arguments of {function['name']!r}")
    if not isinstance(arguments, dict):
        raise InputError(
            f"{place}: the arguments of {function['name']!r} must be a JSON object, got "
            f"{arguments!r:.80}; name each"
        )
    called = _plain({"name": function["name"], "arguments": arguments}, place)
    call: ToolCall = {"type": "function", "function": called}
    if (number := given.get("id")) is not None:
        if not isinstance(number, str) or not number:
            raise InputError(f'{place}: "id" must be text, got {number!r:.80}; correct it')
        call["id"] = _plain(number, place)
    return call


def _check_name(name: Any, place: str) -> None:
    if not isinstance(name, str) or not name or name != name.strip():
        raise InputError(
            f'{place}: "name" must be that of a function, text without spaces around it, got '
            f"{name!r:.80}; correct it"
        )


def _parsed(text: str, place: str) -> Any:
    try:
        return strict_decoder().decode(text)
    except NO_JSON as error:
        raise InputError(
            f"{place} must be JSON, got {text[:80]!r} ({error}); correct it"
        ) from error


def _plain(value: Any, place: str) -> Any:
    """A copy of plain JSON values. Raises InputError for what JSON, or Unicode, cannot hold."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} must be valid Unicode, got the lone surrogate "
            f"{error.object[error.start]!r}; correct the escape"
        ) from error
    except ValueError as error:
        raise InputError(
            f"{place} must be JSON, got a number that is too large for one; correct it"
        ) from error
    return json.loads(text)
