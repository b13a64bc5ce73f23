"""Chat messages as people write them, to roles, texts and calls of tools."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

from opcd.errors import InputError
from opcd.tasks.tools import ToolCall, calls_text, read_calls, read_calls_text


class _Said(TypedDict):
    role: str  # system, user, assistant or tool
    content: str  # text; "" beside calls alone


class Message(_Said, total=False):
    """A message, as chat templates are given it."""

    tool_calls: list[ToolCall]  # of an assistant's; never []
    tool_call_id: str  # of a tool's: the call that it answers
    name: str  # of a tool's: the function that was called
    weight: int  # of an assistant's: 0 where what it says is not to be learned; never another


ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's later name for it
    "user": "user",
    "assistant": "assistant",
}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "assistant", "model"), "assistant"
)
TOOL_ROLES = {"tool": "tool", "function": "tool"}  # the second as OpenAI once called it
SHAREGPT_CALLS = "function_call"
SHAREGPT_TOOL_ROLES = {SHAREGPT_CALLS: "assistant", "observation": "tool", "tool": "tool"}
# What messages of a role may have beside their content.
EXTRAS = {"assistant": {"tool_calls", "function_call"}, "tool": {"tool_call_id", "name"}}
# What says whether an assistant's turn is to be learned: OpenAI's key, and those of others.
WEIGHTS = ("weight", "train", "loss")
TEXT_PARTS = {"text", "input_text", "output_text"}
TOOL_PARTS = {"tool_use", "tool_result", "tool_call"}
PARTS_JOINED = "text parts joined by line breaks"
OLDER_CALLS = '"function_call" read as a call of a tool'


class Conversation(NamedTuple):
    """Messages, checked, and what was done to them, for people."""

    messages: list[Message]
    notes: list[str]


def user(content: str) -> Message:
    """A message of the user's."""
    return {"role": "user", "content": content}


def system(content: str) -> Message:
    """A system message."""
    return {"role": "system", "content": content}


def assistant(content: str, calls: Sequence[ToolCall] = ()) -> Message:
    """A message of the assistant's."""
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = list(calls)
    return message


def unlearned(message: Message) -> Message:
    """The same, not to be learned."""
    return {**message, "weight": 0}


def is_learned(message: Message) -> bool:
    """Whether an assistant's turn is to be learned, where recorded ones are."""
    return message.get("weight") != 0


def calls_of(message: Message) -> list[ToolCall]:
    """The calls that a message makes; [] where it makes none."""
    return message.get("tool_calls", [])


def is_tool_turn(message: Message) -> bool:
    """Whether it calls tools, or is what one gave."""
    return message["role"] == "tool" or bool(calls_of(message))


def words_of(message: Message) -> str:
    """All that a message says: its content, and its calls as JSON, whatever their ids."""
    calls = calls_of(message)
    return "\n".join(filter(None, (message["content"], calls_text(calls) if calls else "")))


def asked(messages: Sequence[Message]) -> str:
    """What the user said last, for people to read."""
    return next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")


def split_system(messages: Sequence[Message]) -> tuple[Message | None, list[Message]]:
    """The system message in front, if there is one, and the rest."""
    if messages and messages[0]["role"] == "system":
        return messages[0], list(messages[1:])
    return None, list(messages)


def read_messages(value: Any, source: str) -> Conversation:
    """Messages as ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}``, each for itself.

    Content is text, or a list of text parts. Calls are OpenAI's ``tool_calls``, its older
    ``function_call``, or a function_call turn of ShareGPT's. Raises InputError for another form, an
    unknown role, images and sounds, keys that would be lost, and a system message that is not the
    first.
    """
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{source}: must be a non-empty list of chat messages, got {type(value).__name__}"
        )
    messages: list[Message] = []
    notes = set[str]()
    for i, given in enumerate(value):
        message = _read_message(given, i, source, notes)
        if message["role"] == "system" and i > 0:
            raise InputError(
                f"{source}: a system message must come first, got one as message {i}; merge it "
                f"into the first"
            )
        messages.append(message)
    return Conversation(messages, sorted(notes))


def is_answer(given: Any) -> bool:
    """Whether a message is the assistant's, whatever else is right or wrong with it."""
    role = given.get("role", given.get("from")) if isinstance(given, dict) else None
    roles = ROLES | SHAREGPT_ROLES | SHAREGPT_TOOL_ROLES
    return isinstance(role, str) and roles.get(role) == "assistant"


def check_unicode(text: str, source: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: text must be valid Unicode, got the lone surrogate "
            f"{text[error.start]!r} at character {error.start}; correct the escape"
        ) from error


def _read_message(given: Any, i: int, source: str, notes: set[str]) -> Message:
    sharegpt = isinstance(given, dict) and {"from", "value"} <= set(given)
    names = ("from", "value") if sharegpt else ("role", "content")
    if not isinstance(given, dict) or ("role" not in given and not sharegpt):
        raise _no_message(given, i, source)
    roles = SHAREGPT_ROLES | SHAREGPT_TOOL_ROLES if sharegpt else ROLES | TOOL_ROLES
    role, content = given[names[0]], given.get(names[1])
    if not isinstance(role, str) or role not in roles:
        raise InputError(
            f"{source}: the role of message {i} must be one of {', '.join(roles)}, got "
            f"{role!r}; correct it"
        )
    message: Message = {"role": roles[role], "content": ""}
    _check_extras(given, names, message["role"], i, source)
    if role == SHAREGPT_CALLS:
        message["tool_calls"] = read_calls_text(content, f"{source}: message {i}")
    elif calls := _calls(given, f"{source}: message {i}", notes):
        message["tool_calls"] = calls
    elif names[1] not in given:
        raise _no_message(given, i, source)
    if role != SHAREGPT_CALLS:
        message["content"] = _content(content, message, i, source, notes)
    if message["role"] == "tool":
        if number := _key(given, "tool_call_id", i, source):
            message["tool_call_id"] = number
        if name := _key(given, "name", i, source):
            message["name"] = name
    if message["role"] == "assistant" and not _weight(given, i, source):
        return unlearned(message)
    return message


def _no_message(given: Any, i: int, source: str) -> InputError:
    return InputError(
        f'{source}: message {i} must be {{"role": ..., "content": ...}}, got {given!r:.80}'
    )


def _calls(given: dict[str, Any], place: str, notes: set[str]) -> list[ToolCall]:
    """The calls of a message; [] where it has none."""
    if given.get("tool_calls") and given.get("function_call"):
        raise InputError(
            f'{place} must have its calls in one place, got "tool_calls" and "function_call"; '
            f"remove one"
        )
    if given.get("function_call"):
        notes.add(OLDER_CALLS)
        return read_calls([given["function_call"]], place)
    return read_calls(given["tool_calls"], place) if given.get("tool_calls") else []


def _content(content: Any, message: Message, i: int, source: str, notes: set[str]) -> str:
    """The text of a message. Raises InputError where there is none, and no call either."""
    result = message["role"] == "tool"
    if isinstance(content, list) and not (result and not all(map(_is_part, content))):
        content = _joined(content, i, source)
        notes.add(PARTS_JOINED)
    if result and not isinstance(content, str):
        raise InputError(
            f"{source}: the content of message {i}, what a tool gave, must be text, got "
            f"{content!r:.80}; write it as the models shall read it, JSON as its text"
        )
    blank = content is None or (isinstance(content, str) and not content.strip())
    if blank and calls_of(message):
        return ""
    if blank or not isinstance(content, str):
        raise InputError(
            f"{source}: the content of message {i} must be a non-empty string, got "
            f"{content!r:.80}; leave that message out, or write what it says"
        )
    check_unicode(content, source)
    return content


def _is_part(value: Any) -> bool:
    return isinstance(value, dict) and "type" in value


def _key(given: dict[str, Any], key: str, i: int, source: str) -> str:
    """What a tool's message says of the call that it answers; "" where it does not."""
    value = given.get(key) or ""
    if not isinstance(value, str):
        raise InputError(
            f'{source}: "{key}" of message {i} must be text, got {value!r:.80}; correct it'
        )
    check_unicode(value, source)
    return value


def _weight(given: dict[str, Any], i: int, source: str) -> bool:
    """Whether an assistant's message is to be learned."""
    for key in WEIGHTS:
        if given.get(key) not in (None, 0, 1):
            raise InputError(
                f'{source}: "{key}" of message {i} must be 0 or 1, got {given[key]!r:.80}; correct '
                f"it, or remove it"
            )
    return not any(given.get(key) == 0 for key in WEIGHTS)


def _check_extras(
    given: dict[str, Any], names: tuple[str, str], role: str, i: int, source: str
) -> None:
    """Keys beside role and content must be empty, or such as messages of that role have."""
    for key in set(given) - set(names) - set(WEIGHTS) - EXTRAS.get(role, set()):
        if not given[key]:
            continue
        if key in EXTRAS["assistant"]:
            raise InputError(
                f'{source}: message {i} must be the assistant\'s to have "{key}", got one of role '
                f"{given[names[0]]!r}; correct the role, or remove it"
            )
        raise InputError(
            f'{source}: message {i} must have a role and a content alone, got "{key}": '
            f"{str(given[key])[:60]!r}, which the model would not see; remove it, or write it into "
            f"the content"
        )


def _joined(parts: list[Any], i: int, source: str) -> str:
    texts = []
    for part in parts:
        kind = str(part.get("type")) if isinstance(part, dict) else type(part).__name__
        text = part.get("text") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS or not isinstance(text, str):
            advice = "images, sounds and files are not supported; leave that row out"
            if kind in TOOL_PARTS:
                advice = (
                    'write calls as "tool_calls" of the assistant\'s message, and what a tool gave '
                    'as a message of the role "tool"'
                )
            raise InputError(
                f"{source}: the content of message {i} must be text, got a part of type {kind!r}; "
                f"{advice}"
            )
        texts.append(text)
    return "\n".join(texts)
