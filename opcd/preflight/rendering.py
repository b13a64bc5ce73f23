"""What both models are really given, and whether that is what the chat template makes of it."""

from collections.abc import Sequence
from typing import NamedTuple

from opcd.models.by_name import load_tokenizer
from opcd.tasks.messages import Message
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case
from opcd.tasks.template import read_template
from opcd.tasks.tools import Tool

SHOWN = 360  # characters of a prompt; its middle is left out


class Rendering(NamedTuple):
    """A request as both models see it, and how many were rendered as transformers renders them."""

    student: str  # decoded, special tokens visible
    teacher: str
    student_tokens: int
    teacher_tokens: int
    saved: float  # prompt tokens a request no longer carries, in the mean
    compared: int  # requests rendered again, apart from this library
    differing: list[str]  # what is not the same, for people
    not_compared: str  # why some were not; "" where all were


def rendering(setup: Setup, cases: Sequence[Case]) -> Rendering:
    """Look at the first case, and render all of them again from the messages as they were given."""
    task, decode = setup.task, setup.tokenizer.decode
    prompt = cases[0].prompt
    student, teacher = prompt.student_ids, task.prompted_ids(prompt)
    compared, differing, reasons = 0, [], []
    for case in cases:
        if why := _not_comparable(setup, case):
            reasons.append(why)
            continue
        compared += 1
        own, whole = _given(setup, case)
        tools = setup.chats[case.example.context].tools
        for who, ids, given in (
            ("student", case.prompt.student_ids, (own, [])),
            ("teacher", task.prompted_ids(case.prompt), (whole, tools)),
        ):
            if _by_transformers(setup, *given) != ids:
                differing.append(f"{case.source}: the {who}'s prompt")
    return Rendering(
        decode(student),
        decode(teacher),
        len(student),
        len(teacher),
        task.prompt_tokens_saved,
        compared,
        differing,
        ", ".join(dict.fromkeys(reasons)),
    )


def rendering_lines(found: Rendering) -> list[str]:
    """The same for people."""
    lines = [
        f"teacher   {found.teacher_tokens} tokens: {_shown(found.teacher)}",
        f"student   {found.student_tokens} tokens: {_shown(found.student)}",
        f"saved     {found.saved:.0f} prompt tokens a request",
    ]
    if found.differing:
        lines.append(
            f"rendering {len(found.differing)} prompts are not what the tokenizer's own "
            f"apply_chat_template writes, first {found.differing[0]}"
        )
    elif found.compared:
        lines.append(
            f"rendering the ids of {found.compared} requests are those of the tokenizer's own "
            f"apply_chat_template"
        )
    if found.not_compared:
        lines.append(f"rendering not compared: {found.not_compared}")
    return lines


def _not_comparable(setup: Setup, case: Case) -> str:
    """Why a plain rendering of the messages would be another on purpose."""
    chat = setup.chats[case.example.context]
    if chat.dated:
        return "the chat template writes a date, and this run keeps one"
    if chat.placement == "user":
        return "the context stands in the first user message"
    if case.example.own_system:
        return "requests with a system message of their own stand behind the context's"
    if setup.config.without_context != "default":
        return "without_context stands in the context's place"
    return ""


def _given(setup: Setup, case: Case) -> tuple[list[Message], list[Message]]:
    """A request's messages, and the same behind the context, as they were given."""
    chat, request = setup.chats[case.example.context], list(case.example.messages)
    return request, [*chat.context, *request]


def _by_transformers(setup: Setup, messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
    """Token ids as a server would make them, by a tokenizer that nothing here has touched."""
    config = setup.config
    tokenizer = load_tokenizer(config.model)
    template = (
        {}
        if config.chat_template is None
        else {"chat_template": read_template(config.chat_template)}
    )
    return tokenizer.apply_chat_template(
        [*messages],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=False,
        **template,
        **config.chat_template_args,
        **({"tools": [*tools]} if tools else {}),
    )


def _shown(text: str) -> str:
    if len(text) <= SHOWN:
        return repr(text)
    half = SHOWN // 2
    return f"{text[:half]!r} … {text[-half:]!r}"
