"""Contexts: what only the teacher sees, as chat messages."""

import json
from pathlib import Path
from typing import Any

from opcd.errors import InputError
from opcd.tasks.formats import ANSWERS, COMPLETIONS, REQUESTS, SYSTEMS
from opcd.tasks.messages import (
    NO_TOOLS,
    ROLES,
    SHAREGPT_ROLES,
    Message,
    check_unicode,
    read_messages,
    tools_in,
)
from opcd.tasks.records import parse_json, read_text

TEXTS = (".txt", ".md")
# What parts of one conversation or prompt are called; no names of contexts.
PARTS = {*ROLES, *SHAREGPT_ROLES, *REQUESTS, *SYSTEMS, *ANSWERS, *COMPLETIONS}
PARTS |= {"role", "content", "context", "contexts", "input", "instructions", "name", "description"}
PARTS |= {"text", "title", "persona", "prompts", "system_message", "demonstrations", "examples"}
NAMED = 8  # contexts of a note


def read_contexts(path: str) -> tuple[dict[str, list[Message]], list[str]]:
    """The contexts as chat messages by name, one alone as ""; and remarks on how they were read.

    .txt and .md are one system message. .json is a list of messages; ``{"messages": [...]}`` and
    whatever else is in the body of an OpenAI request, whose last user message is left out; or
    several contexts: ``{"name": [messages], "other": "a system message"}``.

    Raises InputError for a missing or empty file, another suffix, broken JSON or an unknown role.
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
        return {"": [_system(text, path)]}, []
    value = parse_json(text, path, "context")
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        messages, remarks = _request(value, path)
        return {"": messages}, remarks
    if isinstance(value, dict) and "model" in value and {"input", "instructions"} & set(value):
        raise InputError(
            f'{path}: a request must have "messages", got {", ".join(sorted(value))}; write its '
            f'instructions as {{"messages": [{{"role": "system", "content": "..."}}]}}'
        )
    if not isinstance(value, dict):
        messages, remarks = _context(value, path)
        return {"": messages}, remarks
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
    return {name: messages for name, (messages, _) in found.items()}, remarks


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


def _request(body: dict[str, Any], path: str) -> tuple[list[Message], list[str]]:
    """The context of a request: its messages up to the last one, which is the request itself."""
    if key := tools_in(body):
        raise InputError(
            f'{path}: a context must be text, got a request with "{key}": {NO_TOOLS}; remove it if '
            f"the prompt works without"
        )
    given = body["messages"]
    if body.get("system"):  # where Anthropic's requests have it
        given = [{"role": "system", "content": body["system"]}, *given]
    messages, notes = read_messages(given, path)
    if settings := sorted(set(body) - {"messages", "system"}):
        notes = [f"settings left out: {', '.join(settings)}", *notes]
    if messages[-1]["role"] == "user":
        messages.pop()
        notes = ["the last user message is the request and was left out", *notes]
    if not messages:
        raise InputError(
            f"{path}: a context must hold more than the request, got one user message alone; add "
            f"the system message"
        )
    return messages, _remarks(path, notes)


def _context(value: Any, source: str) -> tuple[list[Message], list[str]]:
    if isinstance(value, str) and value.strip():
        return [_system(value, source)], []
    messages, notes = read_messages(value, source)
    if messages[-1]["role"] == "user":
        raise InputError(
            f"{source}: a context must end with a system or an assistant message, so that the "
            f"prompt can follow it, got a user message at the end; remove it or add the answer "
            f"to it"
        )
    return messages, _remarks(source, notes)


def _system(text: str, source: str) -> Message:
    text = text.strip()
    check_unicode(text, source)
    if len(text.split()) == 1 and Path(text).suffix.lower() in (*TEXTS, ".json"):
        raise InputError(
            f"{source}: a context must be the text itself, got the name of a file, {text!r}; "
            f"write what stands in it"
        )
    return {"role": "system", "content": text}


def _remarks(source: str, notes: list[str]) -> list[str]:
    return [f"{Path(source).name}: {'; '.join(notes)}"] if notes else []
