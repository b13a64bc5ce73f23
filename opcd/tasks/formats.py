"""One row of data, in any of the forms that people have, to a request and what answers it.

Plain: ``{"prompt": text}``, ``{"messages": [...]}``. Also OpenAI's fine-tuning rows (the assistant
last) and batch rows (``body``), TRL's (``prompt`` and ``completion`` as messages), ShareGPT's
(``conversations``), Alpaca's (``instruction``, ``input``, ``output``), and ``question``. A request
may hold turns of tools; schemas that it brings are held against its context's elsewhere.
"""

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.tasks.conversation import read_conversation
from opcd.tasks.messages import (
    Conversation,
    Message,
    assistant,
    calls_of,
    check_unicode,
    is_answer,
    is_learned,
    read_messages,
)
from opcd.tasks.records import Record
from opcd.tasks.tools import SCHEMAS, Tool, ToolCall, schemas_in

REQUESTS = (
    "prompt",
    "messages",
    "conversations",
    "conversation",
    "body",
    "instruction",
    "question",
)
SYSTEMS = ("system", "system_prompt")
ANSWERS = ("answer", "answers", "label")
COMPLETIONS = ("completion", "response", "output")
# Columns that mean nothing here, and what they most often are; rows with one are refused.
OTHER_NAMES = {
    "input": "prompt",
    "query": "prompt",
    "history": "messages",
    "target": "answer",
    "labels": "answer",
    "expected": "answer",
    "expected_output": "answer",
    "ideal": "answer",
    "gold": "answer",
    "ground_truth": "answer",
    "reference": "answer",
    "reference_answer": "answer",
    "solution": "answer",
    "chosen": "completion",
}
NO_MEANING = {"rejected"}
# Columns of many meanings: left out, and named as a guess where nothing else could be it.
PERHAPS = {
    "prompt": ("text", "content", "message", "user_message", "user", "sentence", "utterance"),
    "answer": ("intent", "category", "class", "output_text", "result"),
}
MEDIA = {"image", "images", "image_url", "audio", "audios", "video", "videos"}
# Settings of a request that are not its text.
BATCH = {"custom_id", "method", "url"}
LAST_MESSAGE = "the last assistant message"
LABELS = {"answer", "completion"}  # what a row may have beside its request


class Row(NamedTuple):
    """What a row means."""

    form: str  # whose form it is; "" for the plain ones
    messages: list[Message]  # the request, which ends with a user's message or a tool's
    tools: list[Tool]  # that it brings itself
    answers: tuple[str, ...]  # from a column for them
    completion: str  # a whole answer; "" where there is none, or none is wanted
    calls: list[ToolCall]  # of tools, that the completion makes
    learned: bool  # whether the completion is to be learned, where recorded turns are
    origin: str  # where the completion was found
    context: str  # the name of its context
    notes: list[str]  # how the request was read, for people
    answer_notes: list[str]  # and how the answers were
    unused: list[str]  # columns with no meaning here


def read_row(record: Record, source: str, wanted: Collection[str] = LABELS) -> Row:
    """What a row means: its request, and of the answer and the completion what is wanted.

    Raises InputError where that is not clear or not supported.
    """
    given = {key: value for key, value in record.items() if value is not None}
    _check_columns(given, source, wanted)
    found = [name for name in REQUESTS if name in given]
    if not found:
        raise InputError(_no_request(record, source))
    if len(found) > 1:
        raise InputError(
            f"{source}: the request must stand in one column, got {' and '.join(found)}; remove "
            f"those that are not the user's message"
        )
    name = found[0]
    answered = [key for key in COMPLETIONS if str(given.get(key, "")).strip()]
    form, (messages, notes), last = _request(name, given, source, "completion" in wanted)
    if last is not None:
        form = form or "OpenAI"
        answered.append(LAST_MESSAGE)
    origin = " and ".join(name if name == LAST_MESSAGE else f'"{name}"' for name in answered)
    completion = assistant("")
    if answered and "completion" in wanted:
        if len(answered) > 1:
            raise InputError(
                f"{source}: a row must have one completion, got {' and '.join(answered)}; remove "
                f"the one that is not meant"
            )
        completion = last or _completion(given[answered[0]], answered[0], source)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise InputError(
            f"{source}: the last message must be the user's or a tool's, or the one answer behind "
            f"it, got roles {', '.join(m['role'] for m in messages) or 'assistant'}; the model "
            f"writes the answer"
        )
    messages = _with_system(messages, given, source)
    if name == "messages" and messages[0]["role"] == "system":
        form = "OpenAI"
    answers, spelled = accepted_answers(given, source) if "answer" in wanted else _no_answers(given)
    context = given.get("context", "")
    if not isinstance(context, str) or (context and not context.strip()):
        raise InputError(
            f'{source}: "context" must be the name of one, got {context!r:.80}; leave it out where '
            f"there is one context alone"
        )
    body = given["body"] if name == "body" else {}
    tools = schemas_in(given, source) + schemas_in(body, source)
    known = {*REQUESTS, *SYSTEMS, *ANSWERS, *COMPLETIONS, "context", "input"}
    read = set(SCHEMAS) if tools else set()
    unused = sorted(set(given) - known - read - (BATCH if name == "body" else set()))
    unused += [f"body.{key}" for key in sorted(set(body) - {"messages", *SYSTEMS} - read)]
    return Row(
        form,
        messages,
        tools,
        answers,
        completion["content"],
        calls_of(completion),
        is_learned(completion),
        origin,
        context,
        notes,
        spelled,
        unused,
    )


def guess(wanted: str, record: Record) -> str:
    """What to do about a column that is missing."""
    names: Iterable[str] = REQUESTS if wanted == "prompt" else (*ANSWERS, *COMPLETIONS)
    for name in record:
        if name.strip().lower() in set(names) - set(record):
            return f'rename "{name}" to "{name.strip().lower()}"'
    for name in PERHAPS[wanted]:
        if record.get(name):
            return f'rename "{name}" to "{wanted}" if it is that'
    return f'add "{wanted}"'


def _no_request(record: Record, source: str) -> str:
    """What is wrong with a row in whose columns no request stands."""
    if {"role", "content"} <= set(record) or {"from", "value"} <= set(record):
        return (
            f"{source}: a row must be a whole conversation, got one message of it; write "
            f'{{"messages": [...]}} around its messages'
        )
    if isinstance(record.get("response"), dict):
        return (
            f"{source}: a row must hold its request, got a result of a batch; put what it answers "
            f'into {{"messages": [...]}} of the batch\'s row with the same custom_id'
        )
    lists = [key for key, value in record.items() if _is_rows(value)]
    if lists:
        return (
            f"{source}: a file must hold nothing but its rows, got an object with lists of rows as "
            f"{' and '.join(lists)}; write the list that is meant into a file of its own"
        )
    return (
        f'{source}: must have "prompt" (the user\'s message) or "messages", got keys '
        f"{sorted(record)}; {guess('prompt', record)}"
    )


def _is_rows(value: Any) -> bool:
    requests = {*REQUESTS}
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) and bool(row.keys() & requests) for row in value)
    )


def _check_columns(given: Record, source: str, wanted: Collection[str]) -> None:
    """Raise InputError for columns whose meaning is not supported, or clear only with a name."""
    for key, value in given.items():
        if key in MEDIA and value:
            raise InputError(
                f'{source}: a row must be text, got "{key}", and images and sounds are not '
                f"supported; leave that row out"
            )
        if OTHER_NAMES.get(key) in LABELS - set(wanted) or (key in NO_MEANING and not wanted):
            continue  # left out
        if key in NO_MEANING and value:
            raise InputError(
                f'{source}: got a column "{key}", which has no meaning here; remove it'
            )
        if key in OTHER_NAMES and value and not (key == "input" and "instruction" in given):
            raise InputError(
                f'{source}: got a column "{key}", which has no meaning here; rename it to '
                f'"{OTHER_NAMES[key]}" if it is that, else remove it'
            )


def _request(
    name: str, given: Record, source: str, completed: bool
) -> tuple[str, Conversation, Message | None]:
    """Whose form it is, its messages, how they were read, and what the last one answers.

    That is judged only where a completion is wanted.
    """
    value = given[name]
    if name == "instruction":
        return "Alpaca", _alpaca(value, given.get("input", ""), source), None
    if name in ("prompt", "question") and not isinstance(value, list):
        notes = [] if name == "prompt" else ['"question" is the prompt']
        _check_row(value, name, source)
        text = _text(value, name, source)
        return "", Conversation([{"role": "user", "content": text}], notes), None
    form = {"prompt": "TRL", "messages": "", "question": "", "body": "OpenAI batch"}
    body = value if name == "body" else {}
    if name == "body":
        if not isinstance(value, dict) or "messages" not in value:
            raise InputError(
                f'{source}: "body" must be a request with "messages", got {str(value)[:60]!r}'
            )
        value = value["messages"]
    _check_row(value, name, source)
    last = None
    if not completed and isinstance(value, list) and len(value) > 1 and is_answer(value[-1]):
        value, last = value[:-1], assistant("")
    messages, notes = read_conversation(value, source)
    if last is None and messages[-1]["role"] == "assistant":
        last = messages.pop()
    read = Conversation(_with_system(messages, body, source) if body else messages, notes)
    return form.get(name, "ShareGPT"), read, last


def _check_row(value: Any, name: str, source: str) -> None:
    """Raise InputError for a column of many rows in place of one row's."""
    column = isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(text, str) for text in value)
    )
    if column:
        raise InputError(
            f'{source}: "{name}" must be one request, text or messages, got {str(value)[:60]}; '
            f'write a table row by row: {{"prompt": "...", "answer": "..."}}'
        )


def _alpaca(instruction: Any, more: Any, source: str) -> Conversation:
    _check_row(instruction, "instruction", source)
    text = _text(instruction, "instruction", source)
    if not more:
        return Conversation([{"role": "user", "content": text}], [])
    text = f"{text}\n\n{_text(more, 'input', source)}"
    notes = ["instruction and input joined by a blank line"]
    return Conversation([{"role": "user", "content": text}], notes)


def _with_system(messages: list[Message], given: Record, source: str) -> list[Message]:
    """With the system message that stands in a column of its own in front."""
    texts = [_text(given[key], key, source) for key in SYSTEMS if given.get(key)]
    own = bool(messages) and messages[0]["role"] == "system"
    if own:
        texts.append(messages[0]["content"])
    if len(set(texts)) > 1:
        raise InputError(
            f"{source}: a row must have one system message, got {len(texts)}; merge them into one"
        )
    if not texts or own:
        return messages
    return [{"role": "system", "content": texts[0]}, *messages]


def _completion(value: Any, name: str, source: str) -> Message:
    """From text, or one assistant message."""
    if isinstance(value, list):
        messages, _ = read_messages(value, source)
        if [m["role"] for m in messages] != ["assistant"]:
            raise InputError(
                f'{source}: "{name}" must be text or one assistant message, got roles '
                f"{', '.join(m['role'] for m in messages)}; put the turns before it into the prompt"
            )
        return messages[0]
    return assistant(_text(value, name, source))


def accepted_answers(given: Record, source: str) -> tuple[tuple[str, ...], list[str]]:
    """The accepted answers of a row as text, and how they were read. Raises InputError."""
    found = [name for name in ANSWERS if name in given]
    if len(found) > 1:
        raise InputError(
            f"{source}: the accepted answers must stand in one column, got {' and '.join(found)}; "
            f'put them into "answer", as a list'
        )
    if not found:
        return (), []
    name = found[0]
    values = given[name] if isinstance(given[name], list) else [given[name]]
    plain = str if name == "label" else (str, int, float)  # a label's number is a class or a vote
    if not all(isinstance(value, plain) for value in values):
        kinds = "text" if name == "label" else "a string, a number, true, false or a list of them"
        fix = "write what the model should answer"
        if name == "label":
            fix += ', the class by its name, or rename it to "answer" if it is that number'
        raise InputError(f'{source}: "{name}" must be {kinds}, got {str(given[name])[:60]}; {fix}')
    answers = tuple(map(_spelled, values))
    for answer in answers:
        if not answer.strip():
            raise InputError(
                f'{source}: an "{name}" must not be blank, got {given[name]!r}; remove it, or '
                f'write a word for it, like "none", that the context asks for'
            )
        check_unicode(answer, source)
    notes = [] if name == "answer" else [f'"{name}" is the answer']
    if any(not isinstance(value, str) for value in values):
        notes.append("numbers, true and false are answers as text")
    return answers, notes


def _no_answers(given: Record) -> tuple[tuple[str, ...], list[str]]:
    found = any(name in given for name in ANSWERS)
    return (), ["answers left out: training needs none"] if found else []


def _spelled(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    text = str(value)
    return text.removesuffix(".0") if isinstance(value, float) else text  # whole, as programs write


def _text(value: Any, name: str, source: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f'{source}: "{name}" must be a non-empty string, got {value!r:.80}')
    check_unicode(value, source)
    return value
