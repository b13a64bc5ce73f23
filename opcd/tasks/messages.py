"""Chat messages as people write them, to roles and texts."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from opcd.errors import InputError

Message = dict[str, str]  # {"role": ..., "content": ...}

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's later name for it
    "user": "user",
    "assistant": "assistant",
}
SHAREGPT_ROLES = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
    ("gpt", "chatgpt", "assistant", "model"), "assistant"
)
TOOL_ROLES = {"tool", "function", "function_call", "observation", "ipython"}
TOOL_SETTINGS = ("tools", "functions", "function_call", "tool_choice", "tool_calls")
TOOL_KEYS = {"tool_calls", "tool_call_id", "function_call"}
TEXT_PARTS = {"text", "input_text", "output_text"}
PARTS_JOINED = "text parts joined by line breaks"
NO_TOOLS = "conversations with tools are not supported yet"


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


def assistant(content: str) -> Message:
    """A message of the assistant's."""
    return {"role": "assistant", "content": content}


def split_system(messages: Sequence[Message]) -> tuple[Message | None, list[Message]]:
    """The system message in front, if there is one, and the rest."""
    if messages and messages[0]["role"] == "system":
        return messages[0], list(messages[1:])
    return None, list(messages)


def read_messages(value: Any, source: str) -> Conversation:
    """Messages as ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}``.

    Content is text, or a list of text parts. Raises InputError for another form, an unknown role,
    tools, images and sounds, keys that would be lost, and a system message that is not the first.
    """
    if not isinstance(value, list) or not value:
        raise InputError(
            f"{source}: must be a non-empty list of chat messages, got {type(value).__name__}"
        )
    messages, notes = [], set()
    for i, given in enumerate(value):
        sharegpt = isinstance(given, dict) and {"from", "value"} <= set(given)
        names = ("from", "value") if sharegpt else ("role", "content")
        if not isinstance(given, dict) or ("role" not in given and not sharegpt):
            raise InputError(
                f'{source}: message {i} must be {{"role": ..., "content": ...}}, got {given!r:.80}'
            )
        role, content = given[names[0]], given.get(names[1])
        _check_extras(given, names, i, source)
        roles = SHAREGPT_ROLES if sharegpt else ROLES
        if isinstance(role, str) and role in TOOL_ROLES:
            raise InputError(
                f"{source}: the role of message {i} must be system, user or assistant, got "
                f"{role!r}: {NO_TOOLS}; leave that conversation out"
            )
        if not isinstance(role, str) or role not in roles:
            raise InputError(
                f"{source}: the role of message {i} must be one of {', '.join(roles)}, got "
                f"{role!r}; correct it"
            )
        if names[1] not in given:
            raise InputError(
                f'{source}: message {i} must be {{"role": ..., "content": ...}}, got {given!r:.80}'
            )
        if isinstance(content, list):
            content = _joined(content, i, source)
            notes.add(PARTS_JOINED)
        if not isinstance(content, str) or not content.strip():
            raise InputError(
                f"{source}: the content of message {i} must be a non-empty string, got "
                f"{content!r:.80}; leave that message out, or write what it says"
            )
        check_unicode(content, source)
        if roles[role] == "system" and i > 0:
            raise InputError(
                f"{source}: a system message must come first, got one as message {i}; merge it "
                f"into the first"
            )
        messages.append({"role": roles[role], "content": content})
    return Conversation(messages, sorted(notes))


def is_answer(given: Any) -> bool:
    """Whether a message is the assistant's, whatever else is right or wrong with it."""
    role = given.get("role", given.get("from")) if isinstance(given, dict) else None
    return isinstance(role, str) and (ROLES | SHAREGPT_ROLES).get(role) == "assistant"


def tools_in(given: dict[str, Any]) -> str | None:
    """What makes a request one with tools; a choice among none means nothing."""
    named = (key for key in TOOL_SETTINGS if given.get(key) and given[key] not in ("none", "auto"))
    return next(named, None)


def check_unicode(text: str, source: str) -> None:
    """JSON can spell half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{source}: text must be valid Unicode, got the lone surrogate "
            f"{text[error.start]!r} at character {error.start}; correct the escape"
        ) from error


def _check_extras(given: dict[str, Any], names: Collection[str], i: int, source: str) -> None:
    """Keys beside role and content must be empty; a weight is of no matter where nothing of it
    is trained on."""
    for key in set(given) - set(names) - {"weight"}:
        if not given[key]:
            continue
        if key in TOOL_KEYS:
            raise InputError(
                f'{source}: message {i} must be text, got "{key}": {NO_TOOLS}; leave that '
                f"conversation out"
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
            raise InputError(
                f"{source}: the content of message {i} must be text, got a part of type {kind!r}; "
                f"images, sounds and files are not supported; leave that row out"
            )
        texts.append(text)
    return "\n".join(texts)
