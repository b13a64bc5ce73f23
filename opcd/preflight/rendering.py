"""What both models are really given, and whether that is what the chat template makes of it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from opcd.episodes import Episode
from opcd.models.by_name import load_tokenizer
from opcd.tasks.messages import Message
from opcd.tasks.prepare import Setup
from opcd.tasks.task import Case
from opcd.tasks.template import read_template
from opcd.tasks.tools import Tool

SHOWN = 360  # characters of each part of a prompt; the middle is left out


class Piece(NamedTuple):
    """Tokens of a recorded conversation that stand next to each other, for the student."""

    text: str  # decoded, special tokens visible
    tokens: int
    scored: bool


class Rendering(NamedTuple):
    """A request as both models see it, and how many were rendered as transformers renders them."""

    student: str  # decoded, special tokens visible
    teacher: str
    # Where the context's texts begin and end in the teacher's; None where they are not found there.
    context: tuple[int, int] | None
    student_tokens: int
    teacher_tokens: int
    saved: float  # prompt tokens a request no longer carries, in the mean
    compared: int  # requests rendered again, apart from this library
    differing: list[str]  # what is not the same, for people
    not_compared: str  # why some were not; "" where all were
    recorded: list[Piece]  # the first of the conversations that are trained on, where some are


def rendering(setup: Setup, cases: Sequence[Case]) -> Rendering:
    """Look at the first case, and render all of them again from the messages as they were given."""
    task, decode = setup.task, setup.tokenizer.decode
    first = cases[0].prompt
    student, teacher = first.student_ids, task.prompted_ids(first)
    text = decode(teacher)
    unlike = {name: _unlike_plain(setup, name) for name in setup.chats}
    by_transformers = _plain_renderer(setup)
    compared, differing, reasons = 0, [], []
    for case in cases:
        if why := unlike[case.example.context] or _own_system(case):
            reasons.append(why)
            continue
        compared += 1
        request = list(case.example.messages)
        tools = setup.chats[case.example.context].tools
        for who, ids, messages, theirs in (
            ("student", case.prompt.student_ids, request, []),
            ("teacher", task.prompted_ids(case.prompt), [*_context(setup, case), *request], tools),
        ):
            if by_transformers(messages, theirs) != ids:
                differing.append(f"{case.source}: the {who}'s prompt")
    return Rendering(
        decode(student),
        text,
        _place(text, _context(setup, cases[0])),
        len(student),
        len(teacher),
        task.prompt_tokens_saved,
        compared,
        differing,
        ", ".join(dict.fromkeys(reasons)),
        pieces(task.recorded[0][-1], decode) if task.recorded else [],
    )


def pieces(episode: Episode, decode: Callable[[Sequence[int]], str]) -> list[Piece]:
    """A conversation as the student is given it, parted into what is scored and what is not."""
    found, begin, ids = [], 0, episode.student_ids
    for start, length in episode.student_spans:
        for end, scored in ((start, False), (start + length, True)):
            # As a part of the whole: alone, many tokenizers leave a first space out.
            text = decode(ids[:end])[len(decode(ids[:begin])) :]
            if end > begin:
                found.append(Piece(text, end - begin, scored))
            begin = end
    return found


def rendering_lines(found: Rendering) -> list[str]:
    """The same for people."""
    lines = [
        f"teacher   sees {found.teacher_tokens} tokens: {_marked(found.teacher, found.context)}",
        f"student   sees {found.student_tokens} tokens: {_shown(found.student)}",
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
    if found.recorded:
        lines.append(_recorded_line(found.recorded))
    if found.not_compared:
        lines.append(f"rendering not compared: {found.not_compared}")
    return lines


def _recorded_line(conversation: Sequence[Piece]) -> str:
    """What is scored of a recorded conversation, in brackets that no template writes."""
    scored, tokens = (sum(p.tokens for p in conversation if p.scored or all_) for all_ in (0, 1))
    text = " ".join(f"⟦{_shown(p.text)}⟧" if p.scored else _shown(p.text) for p in conversation)
    return f"recorded  {scored} of {tokens} tokens are scored, those in ⟦⟧: {text}"


def _unlike_plain(setup: Setup, context: str) -> str:
    """Why a plain rendering of the messages would be another on purpose; "" where it would not."""
    chat = setup.chats[context]
    if chat.dated:
        return "the chat template writes a date, and this run keeps one"
    if chat.placement == "user":
        return "the context stands in the first user message"
    if setup.config.without_context != "default":
        return "without_context stands in the context's place"
    return ""


def _own_system(case: Case) -> str:
    own = case.example.own_system
    return "requests with a system message of their own stand behind the context's" if own else ""


def _context(setup: Setup, case: Case) -> list[Message]:
    return setup.chats[case.example.context].context


def _plain_renderer(setup: Setup) -> Callable[[Sequence[Message], Sequence[Tool]], list[int]]:
    """What makes token ids of messages and tools as a server does: a tokenizer left as it is."""
    config = setup.config
    tokenizer = load_tokenizer(config.model)
    options = dict(config.chat_template_args)
    if config.chat_template is not None:
        options["chat_template"] = read_template(config.chat_template)

    def render(messages: Sequence[Message], tools: Sequence[Tool]) -> list[int]:
        ids: list[int] = tokenizer.apply_chat_template(
            [*messages],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
            **options,
            **({"tools": [*tools]} if tools else {}),
        )
        return ids

    return render


def _place(text: str, context: Sequence[Message]) -> tuple[int, int] | None:
    """Where a context begins and ends: from the first message's text to the last one's."""
    begins, end = [], 0
    for message in context:
        content = message["content"].strip()
        begins.append(text.find(content, end))
        end = begins[-1] + len(content)
    return (begins[0], end) if begins and min(begins) >= 0 else None


def _marked(text: str, place: tuple[int, int] | None) -> str:
    if place is None:
        return _shown(text)
    begin, end = place
    front, context, behind = map(_shown, (text[:begin], text[begin:end], text[end:]))
    return f"{front} [the context: {context}] {behind}"


def _shown(text: str) -> str:
    if len(text) <= SHOWN:
        return repr(text)
    half = SHOWN // 2
    return f"{text[:half]!r} … {text[-half:]!r}"
