"""Contexts: what only the teacher sees, as chat messages and the tools that it may call."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.tasks.conversation import read_conversation
from opcd.tasks.formats import ANSWERS, COMPLETIONS, REQUESTS, SYSTEMS
from opcd.tasks.messages import (
    ROLES,
    SHAREGPT_ROLES,
    Message,
    calls_of,
    check_unicode,
    split_system,
    system,
)
from opcd.tasks.records import parse_json, read_text
from opcd.tasks.tools import SCHEMAS, Tool, names_of, schemas_in

TEXTS = (".txt", ".md")
# What parts of one conversation or prompt are called; no names of contexts.
PARTS = {*ROLES, *SHAREGPT_ROLES, *REQUESTS, *SYSTEMS, *ANSWERS, *COMPLETIONS}
PARTS |= {"role", "content", "context", "contexts", "input", "instructions", "name", "description"}
PARTS |= {"text", "title", "persona", "prompts", "system_message", "demonstrations", "examples"}
NAMED = 8  # contexts, or tools, of a note


class Context(NamedTuple):
    """What only the teacher sees; one of both may be empty."""

    messages: list[Message]
    tools: Sequence[Tool] = ()  # which chat templates write where they will


def read_contexts(path: str) -> tuple[dict[str, Context], list[str]]:
    """The contexts by name, one alone as ""; and remarks on how they were read.

    .txt and .md are one system message. .json is a list of messages; ``{"messages": [...], "tools":
    [...]}`` and whatever else is in the body of an OpenAI request, of which the last user message
    and the turns of tools behind it are left out; or several contexts, of which each is one of
    these or a text: ``{"name": [messages], "other": "a system message"}``.

    Raises InputError for a missing or empty file, another suffix, broken JSON, an unknown role, and
    what `read_conversation` and `schemas_in` refuse.
    """
    suffix = Path(path).suffix.lower()
    if Path(path).is_file() and suffix not in (*TEXTS, ".json"):
        raise InputError(
            f"context must be a .txt, .md (one system message) or .json file (a list of chat "
            f"messages), got {path!r}; rename or convert it"
        )
    text = read_text(path, "context")
    if suffix in TEXTS:
        _check_no_messages(text, path)
        return {"": Context([_system(text, path)])}, []
    value = parse_json(text, path, "context")
    if _is_request(value):
        context, remarks = _request(value, path)
        return {"": context}, remarks
    if isinstance(value, dict) and "model" in value and {"input", "instructions"} & set(value):
        raise InputError(
            f'{path}: a request must have "messages", got {", ".join(sorted(value))}; write its '
            f'instructions as {{"messages": [{{"role": "system", "content": "..."}}]}}'
        )
    if not isinstance(value, dict):
        context, remarks = _context(value, path)
        return {"": context}, remarks
    _check_no_schemas(value, path)
    if set(value) <= {"role", "content"} and value:
        raise InputError(
            f"{path}: a context must be a list of messages, got one message alone; put it in "
            f"brackets: [{{...}}]"
        )
    if parts := sorted(name for name in value if _plain(name) in PARTS):
        raise InputError(
            f"{path}: several contexts must have names of their own, got {', '.join(parts)}, as "
            f'parts of one are called; write one as [{{"role": "system", "content": "..."}}, ...] '
            f"without the request, or rename a context that is called so"
        )
    if not value or not all(name and name == name.strip() for name in value):
        raise InputError(
            f"{path}: several contexts must have a name each, without spaces around it, got "
            f'names {sorted(value)}; write {{"name": [messages], ...}}'
        )
    found = {name: _context(given, f"{path}: {name}") for name, given in value.items()}
    names = ", ".join(list(found)[:NAMED]) + (", ..." if len(found) > NAMED else "")
    contexts = f"{len(found)} context{'s' if len(found) > 1 else ''}"
    remarks = [f"{Path(path).name}: {contexts}, which rows name: {names}"]
    remarks += [remark for _, said in found.values() for remark in said]
    return {name: context for name, (context, _) in found.items()}, remarks


def _plain(name: str) -> str:
    return name.strip().lower().replace(" ", "_").replace("-", "_")


def _check_no_messages(text: str, path: str) -> None:
    """Raise InputError for a text file of JSON with messages, which a template would quote."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return
    parts = [value, [value], *value.values()] if isinstance(value, dict) else [value]
    if any(_are_messages(part) for part in parts):
        raise InputError(
            f"{path}: a text file must be one system message, got JSON with chat messages; name "
            f"the file .json"
        )


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and (m.keys() & {"role", "from"}) for m in value)
        and any(m.keys() & {"content", "value"} for m in value)
    )


def _check_no_schemas(value: dict[str, Any], path: str) -> None:
    """Raise InputError for tools that stand beside no list of messages."""
    for name in SCHEMAS:
        listed = value.get(name)
        if isinstance(listed, list) and any(map(_is_no_message, listed)):
            raise InputError(
                f'{path}: a context with tools must be {{"messages": [...], "tools": [...]}}, got '
                f'{", ".join(sorted(value))}; write its texts as "messages" ([] for none)'
            )


def _is_no_message(value: Any) -> bool:
    return isinstance(value, dict) and not {"role", "from"} & set(value)


def _is_request(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("messages"), list)


def _request(body: dict[str, Any], source: str) -> tuple[Context, list[str]]:
    """The context of a request: its tools, and its messages up to the request itself."""
    tools = schemas_in(body, source)
    given = body["messages"]
    if body.get("system"):  # where Anthropic's requests have it
        given = [{"role": "system", "content": body["system"]}, *given]
    messages: list[Message] = []
    notes: list[str] = []
    if given or not tools:
        messages, notes = read_conversation(given, source)
    if tools:
        shown = ", ".join(names_of(tools)[:NAMED]) + (", ..." if tools[NAMED:] else "")
        notes = [f"{len(tools)} tool{'s' if len(tools) > 1 else ''}: {shown}", *notes]
    if settings := sorted(set(body) - {"messages", "system"} - (set(SCHEMAS) if tools else set())):
        notes = [f"settings left out: {', '.join(settings)}", *notes]
    if messages and messages[-1]["role"] in ("user", "tool"):
        last = max(i for i, message in enumerate(messages) if message["role"] == "user")
        left_out = "the last user message is the request and was left out"
        if messages[last + 1 :]:
            left_out = "the last user message and the tools' turns behind it are the request and "
            left_out += "were left out"
        messages, notes = messages[:last], [left_out, *notes]
    if not messages and not tools:
        raise InputError(
            f"{source}: a context must hold more than the request, got one user message alone; add "
            f"the system message"
        )
    context = Context(messages, tuple(tools))
    _check_tool_turns(context, source)
    return context, _remarks(source, notes)


def _context(value: Any, source: str) -> tuple[Context, list[str]]:
    if isinstance(value, str) and value.strip():
        return Context([_system(value, source)]), []
    if _is_request(value):
        return _request(value, source)
    messages, notes = read_conversation(value, source)
    if messages[-1]["role"] == "user":
        raise InputError(
            f"{source}: a context must end with a system or an assistant message, so that the "
            f"prompt can follow it, got a user message at the end; remove it or add the answer "
            f"to it"
        )
    context = Context(messages)
    _check_tool_turns(context, source)
    return context, _remarks(source, notes)


def _check_tool_turns(context: Context, source: str) -> None:
    """Raise InputError for calls or results without an answer, and for tools in front of one."""
    messages = context.messages
    if messages and (messages[-1]["role"] == "tool" or calls_of(messages[-1])):
        found = "what a tool gave" if messages[-1]["role"] == "tool" else "the call of a tool"
        raise InputError(
            f"{source}: a context must end with a system message or an answer, so that the prompt "
            f"can follow it, got {found} at the end; add the turns up to the answer, or remove it"
        )
    _, turns = split_system(messages)
    if context.tools and turns and turns[0]["role"] != "user":
        raise InputError(
            f"{source}: the turns of a context with tools must begin with a user message, in which "
            f"some chat templates write the tools, got the assistant's; remove it, or write what "
            f"it answers"
        )


def _system(text: str, source: str) -> Message:
    text = text.strip()
    check_unicode(text, source)
    if len(text.split()) == 1 and Path(text).suffix.lower() in (*TEXTS, ".json"):
        raise InputError(
            f"{source}: a context must be the text itself, got the name of a file, {text!r}; "
            f"write what stands in it"
        )
    return system(text)


def _remarks(source: str, notes: list[str]) -> list[str]:
    return [f"{Path(source).name}: {'; '.join(notes)}"] if notes else []
