"""Contexts, prompts and evaluation examples, read from files and checked line by line."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd.errors import InputError

Message = dict[str, str]  # {"role": ..., "content": ...}

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A prompt, as chat messages, and the answers that count as right (none for training)."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    source: str  # "file:line", for error messages
    context: str = ""  # the name of the context that belongs to it, where there are several

    @property
    def text(self) -> str:
        """The last user message, for people to read."""
        return self.messages[-1]["content"]


def read_contexts(path: str) -> dict[str, list[Message]]:
    """The contexts as chat messages by name; one alone has the name "".

    .txt and .md are one system message, .json is a list of messages, or several contexts:
    ``{"name": [messages], "other": "a system message"}``.

    Raises InputError for a missing or empty file, another suffix, broken JSON or an unknown role.
    """
    text = _read(path, "context")
    suffix = Path(path).suffix.lower()
    if suffix in (".txt", ".md"):
        return {"": _context(text, path)}
    if suffix != ".json":
        raise InputError(
            f"context must be a .txt, .md (one system message) or .json file (a list of chat "
            f"messages), got {path!r}; rename or convert it"
        )
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}:{error.lineno}: context must be valid JSON, got {error.msg} at column "
            f"{error.colno}; correct that line"
        ) from error
    if not isinstance(value, dict):
        return {"": _context(value, path)}
    if set(value) <= {"role", "content"} and value:
        raise InputError(
            f"{path}: a context must be a list of messages, got one message alone; put it in "
            f"brackets: [{{...}}]"
        )
    if not value or not all(name and name == name.strip() for name in value):
        raise InputError(
            f"{path}: several contexts must have a name each, without spaces around it, got "
            f'names {sorted(value)}; write {{"name": [messages], ...}}'
        )
    return {name: _context(messages, f"{path}: {name}") for name, messages in value.items()}


def _context(value: Any, source: str) -> list[Message]:
    if isinstance(value, str) and value.strip():
        _check_unicode(value, source)
        return [{"role": "system", "content": value.strip()}]
    context = _messages(value, source)
    if context[-1]["role"] == "user":
        raise InputError(
            f"{source}: a context must end with a system or an assistant message, so that the "
            f"prompt can follow it, got a user message at the end; remove it or add the answer "
            f"to it"
        )
    return context


def read_examples(path: str, answers_required: bool) -> list[Example]:
    """One example a line: ``{"prompt": str}`` or ``{"messages": [...]}``, and ``"answer"``.

    Raises InputError naming the file and the line.
    """
    kind = "evaluation data" if answers_required else "prompts"
    records = read_records(path, kind)
    return [_example(record, source, answers_required) for source, record in records]


def read_records(path: str, kind: str) -> list[tuple[str, dict[str, Any]]]:
    """The objects of a JSONL file, each with its place ("file:line").

    Raises InputError naming the file and the line.
    """
    records = []
    for number, line in enumerate(_read(path, kind).split("\n"), start=1):
        if not line.strip():
            continue
        source = f"{path}:{number}"
        try:
            record = json.loads(line, object_pairs_hook=_unique_keys)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{source}: each line must be one JSON object, got {error.msg} at column "
                f"{error.colno}; correct that line"
            ) from error
        if not isinstance(record, dict):
            raise InputError(
                f'{source}: must be an object like {{"prompt": "..."}}, got {type(record).__name__}'
            )
        records.append((source, record))
    if not records:
        raise InputError(f"{path}: {kind} must hold at least one line, got none; add examples")
    return records


def check_contexts(parts: dict[str, list[Example]], contexts: dict[str, list[Message]]) -> None:
    """Raise InputError if an example names none of several contexts, or one where there is none."""
    for example in (e for examples in parts.values() for e in examples):
        if example.context not in contexts:
            names = ", ".join(sorted(filter(None, contexts)))
            what = f'"context" must be one of {names}' if names else 'there must be no "context"'
            fix = "name one" if names else "leave it out, or give the contexts a name each"
            raise InputError(f"{example.source}: {what}, got {example.context!r}; {fix}")


def check_disjoint(parts: dict[str, list[Example]], contexts: dict[str, list[Message]]) -> None:
    """Raise InputError if a prompt stands in two parts, or an evaluation prompt in the context.

    A scorecard on prompts that were trained on, or shown to the teacher, would flatter.
    """
    seen = {
        _normalised(m["content"]): "a demonstration of the context"
        for context in contexts.values()
        for m in context
        if m["role"] == "user"
    }
    for examples in parts.values():
        here = {}
        for example in examples:
            key = _normalised(" ".join(m["content"] for m in example.messages))
            if key in seen:
                raise InputError(
                    f"{example.source}: training, validation and test prompts must be disjoint "
                    f"from each other and from the context's demonstrations, but "
                    f"{example.text!r} is also {seen[key]}; remove one of them"
                )
            here[key] = f"at {example.source}"
        seen.update(here)


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split())


def _read(path: str, kind: str) -> str:
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{kind} must be a file, got the folder {path!r}; name a file in it")
    if not file.is_file():
        raise InputError(f"{kind} must be a file, got {path!r}, which is not there; check the path")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{kind} must be readable, got {path!r}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#x} at offset "
            f"{error.start}; convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: {kind} must not be empty, got {len(text)} blank characters")
    return text


def _example(record: dict[str, Any], source: str, answers_required: bool) -> Example:
    if ("prompt" in record) == ("messages" in record):
        raise InputError(
            f'{source}: must have either "prompt" or "messages", got keys {sorted(record)}; '
            f"name the user's message one way"
        )
    if "prompt" in record:
        prompt = record["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(f'{source}: "prompt" must be a non-empty string, got {prompt!r}')
        _check_unicode(prompt, source)
        messages = [{"role": "user", "content": prompt}]
    else:
        messages = _messages(record["messages"], source)
        if messages[-1]["role"] != "user":
            raise InputError(
                f"{source}: the last message must be the user's, got role "
                f"{messages[-1]['role']!r}; the model writes the answer"
            )
        if messages[0]["role"] == "system":
            raise InputError(
                f"{source}: a prompt must not carry a system message, since the context stands in "
                f"front of it; move it to the context"
            )
    answers = record.get("answer", [])
    answers = [answers] if isinstance(answers, str) else answers
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InputError(f'{source}: "answer" must be a string or a list of strings, got {answers}')
    if not all(a.strip() for a in answers):
        raise InputError(f'{source}: an "answer" must not be blank, got {answers}; remove it')
    if answers_required and not answers:
        raise InputError(
            f'{source}: evaluation data needs "answer" (a string or a list of accepted ones), '
            f"got keys {sorted(record)}; add it, or use the line as a training prompt"
        )
    context = record.get("context", "")
    if not isinstance(context, str) or ("context" in record and not context.strip()):
        raise InputError(f'{source}: "context" must be the name of one, got {context!r}')
    return Example(tuple(messages), tuple(answers), source, context)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two equal keys JSON would silently keep the last."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        raise json.JSONDecodeError(f"a key that stands twice among {keys}", "", 0)
    return record


def _check_unicode(text: str, source: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: text must be valid Unicode, got the lone surrogate "
            f"{text[error.start]!r} at character {error.start}; correct the escape"
        ) from error


def _messages(value: Any, source: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{source}: must be a non-empty list of chat messages, got {type(value).__name__}"
        )
    for i, message in enumerate(value):
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise InputError(
                f'{source}: message {i} must be {{"role": ..., "content": ...}}, got {message!r}'
            )
        if message["role"] not in ROLES:
            raise InputError(
                f"{source}: the role of message {i} must be one of {', '.join(ROLES)}, got "
                f"{message['role']!r}; correct it"
            )
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise InputError(
                f"{source}: the content of message {i} must be a non-empty string, got "
                f"{message['content']!r}"
            )
        _check_unicode(message["content"], source)
        if message["role"] == "system" and i > 0:
            raise InputError(
                f"{source}: a system message must come first, got one as message {i}; merge it "
                f"into the first"
            )
    return value
