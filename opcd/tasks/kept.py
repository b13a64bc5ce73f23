"""Whether a chat template keeps messages: each is rendered between two marks of its own."""

from collections.abc import Callable, Sequence

from opcd.errors import InputError
from opcd.scoring.reasoning import split_thought
from opcd.tasks.messages import Message, assistant
from opcd.tasks.template import Template

Arrange = Callable[[Sequence[Message]], list[Message]]  # messages to all that is rendered


def check_kept(template: Template, messages: Sequence[Message], arrange: Arrange) -> str:
    """Raise InputError if a message is not in the text as it is; returns the text with marks.

    Without marks the words of a dropped message could be found elsewhere.
    """
    plain = template.text(arrange(messages))
    text = template.text(arrange([_marked(m, i) for i, m in enumerate(messages)]))
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if _marked(message, i)["content"] in text and content in plain:
            continue
        behind_reasoning = content.rpartition("</think>")[2].strip()
        if behind_reasoning != content and behind_reasoning in text:
            advice = "write that answer without its reasoning"
        else:
            advice = (
                "write it in another role, or name a file with another template as chat_template"
            )
        raise InputError(
            f"the chat template of {template.name!r} must keep every message, but it drops or "
            f"alters the {message['role']} message {content[:60]!r}; {advice}"
        )
    return text


def check_behind(template: Template, messages: Sequence[Message], arrange: Arrange) -> None:
    """Raise InputError if the last message, a request's own, does not stand behind all others."""
    text = check_kept(template, messages, arrange)
    *others, own = [text.index(_open(i)) for i in range(len(messages))]
    if own < max(others, default=-1):
        raise InputError(
            f"a system message of a request's own must stand behind the context, but the chat "
            f"template of {template.name!r} puts it in front of it: "
            f"{messages[-1]['content'][:60]!r}; put it into the user's message"
        )


def without_thoughts(messages: Sequence[Message]) -> list[Message]:
    """A conversation as a template may keep it: many leave the thoughts of earlier turns out."""
    return [
        assistant(split_thought(m["content"]).answer or m["content"])
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


def _open(number: int) -> str:
    return f"zebra {number} begins: "


def _marked(message: Message, number: int) -> Message:
    content = f"{_open(number)}{message['content'].strip()} :ends zebra {number}"
    return {"role": message["role"], "content": content}
