"""Prompts and evaluation examples, and what must hold between the parts of a run's data."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from opcd.errors import InputError
from opcd.scoring.reasoning import split_thought
from opcd.scoring.texts import folded, normalised
from opcd.tasks.contexts import Context
from opcd.tasks.conversation import learned_turns
from opcd.tasks.formats import ANSWERS, COMPLETIONS, LABELS, Row, guess, read_row
from opcd.tasks.messages import (
    Message,
    asked,
    assistant,
    calls_of,
    is_learned,
    is_tool_turn,
    split_system,
    unlearned,
    words_of,
)
from opcd.tasks.records import Record, read_records
from opcd.tasks.tools import Tool, calls_text, names_of

Turns = tuple[tuple[str, str], ...]  # who says what, without differences nobody means
Contexts = Mapping[str, Context]  # by name; one alone is ""
NO_CONTEXT = Context([])

SHOWN = 5  # of a list of mistakes


@dataclass(frozen=True)
class Example:
    """A prompt, as chat messages, and the answers that count as right, where they are known."""

    messages: tuple[Message, ...]  # a system message in front is the request's own
    answers: tuple[str, ...]
    source: str  # "file:line", for error messages
    context: str = ""  # the name of the context that belongs to it, where there are several
    turn: Message | None = None  # the assistant's, as it was recorded, where that is trained on

    @property
    def own_system(self) -> bool:
        """Whether it has a system message of its own."""
        return self.messages[0]["role"] == "system"

    @property
    def text(self) -> str:
        """The last user message, for people to read."""
        return asked(self.messages)

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The prompt, and the recorded turn behind it."""
        return (*self.messages, self.turn) if self.turn else self.messages


def read_examples(
    path: str,
    wants_answers: bool,
    contexts: Contexts,
    recorded: bool = False,  # whether prompts are conversations whose turns are trained on
) -> tuple[list[Example], list[str]]:
    """The examples of a file in any form of `formats`, and remarks on how it was read.

    A system message that is the context's is taken out; another one stays with its request. A
    completion is the answer where answers are wanted, unless the row has one, and the last turn of
    a recorded conversation; else it is left out.

    Raises InputError naming the file and the line, also where some rows have answers and some not,
    and for a recorded conversation without an assistant turn.
    """
    wanted = LABELS if wants_answers else {"completion"} if recorded else set[str]()
    kind = "evaluation data" if wants_answers else "prompts"
    examples: list[Example] = []
    unanswered: list[tuple[str, Record]] = []
    forms, notes, unused = Counter[str](), Counter[str](), set[str]()
    for source, record in read_records(path, kind):
        row = read_row(record, source, wanted)
        messages, found = strip_context(row, contexts.get(row.context, NO_CONTEXT), source)
        answers: tuple[str, ...] = ()
        turn = None
        said = [*_left_out(row), *row.answer_notes]
        if recorded:
            messages, turn, said = _recorded(row, messages, source)
        if wants_answers:
            answers, said = _accepted(row, source)
            if not answers:
                unanswered.append((source, record))
        examples.append(Example(tuple(messages), answers, source, row.context, turn))
        notes.update([*row.notes, *found, *said])
        forms[row.form] += 1
        unused.update(row.unused)
    if unanswered:
        _check_meant(*unanswered[0], len(unanswered) == len(examples))
    return examples, row_remarks(path, forms, notes, unused)


def _check_meant(source: str, record: Record, nowhere: bool) -> None:
    """Raise InputError for a row without an answer, unless no row has one, and none was meant."""
    advice = guess("answer", record)
    if nowhere and "rename" not in advice and not {*ANSWERS, *COMPLETIONS} & set(record):
        return
    raise InputError(
        f'{source}: evaluation data needs "answer" (a string or a list of accepted ones) in every '
        f"row, or in none, got keys {sorted(record)}; {advice}"
    )


def _recorded(
    row: Row, messages: list[Message], source: str
) -> tuple[list[Message], Message, list[str]]:
    """A conversation up to its last assistant turn, that turn, and how the row was read."""
    if row.completion or row.calls:
        turn = assistant(row.completion, row.calls)
        messages = [*messages, turn if row.learned else unlearned(turn)]
    turns = learned_turns(messages, source)
    if not turns:
        raise InputError(
            f"{source}: with source recorded a row must hold an assistant turn behind a user's "
            f"message, and not of weight 0, got roles {', '.join(m['role'] for m in messages)}; "
            f'add what the assistant said, as the last message or as "completion", or remove the '
            f"row"
        )
    last = turns[-1]
    notes = []
    if not all(map(is_learned, messages)):
        notes.append("assistant turns of weight 0 are not trained on")
    if messages[last + 1 :]:
        notes.append("what stands behind the last assistant turn left out")
    return messages[:last], messages[last], [*row.answer_notes, *notes]


def strip_context(row: Row, context: Context, source: str) -> tuple[list[Message], list[str]]:
    """A request without the context that stands in front of it, and what was found.

    Taken out are the context's system message and its demonstrations, each as a whole and white
    space aside, and its tools; a system message of the request's own stays.

    Raises InputError for a request that begins with some of the demonstrations, for a system
    message that holds the context and more, which the student would see, and for tools of the
    request's own.
    """
    messages, notes = _without(row.messages, context.messages, source)
    if not row.tools:
        return messages, notes
    if sorted(row.tools, key=_name) != sorted(context.tools, key=_name):
        raise InputError(
            f"{source}: the tools of a row must be its context's, got {_other_tools(row, context)}"
            f'; put them into the context ({{"messages": [...], "tools": [...]}}), of which each '
            f"set of tools needs one with a name of its own, or leave them out of the row"
        )
    return messages, [*notes, "its tools are the context's and were taken out"]


def _other_tools(row: Row, context: Context) -> str:
    """How the tools of a row differ from its context's."""
    given, known = sorted(map(_name, row.tools)), sorted(map(_name, context.tools))
    if given == known:
        changed = [_name(tool) for tool in row.tools if tool not in context.tools]
        return f"another schema of {', '.join(changed)}"
    return f"{', '.join(given)} where the context has {', '.join(known) or 'none'}"


def _name(tool: Tool) -> str:
    return names_of([tool])[0]


def _without(
    messages: Sequence[Message], context: Sequence[Message], source: str
) -> tuple[list[Message], list[str]]:
    """Messages without the context's in front of them, and what was found."""
    instructions, demonstrations = split_system(context)
    own, rest = split_system(messages)
    front = [own] if own else []
    shown = len(demonstrations)
    taken = 0 < shown < len(rest) and all(map(_same, rest, demonstrations))
    if taken:
        rest = rest[shown:]
    _check_begins(rest, demonstrations, source)
    known = own is not None and instructions is not None and _same(own, instructions)
    if taken and (known or not (own or instructions)):
        return rest, ["the whole context was taken out"]
    if known:
        whose = "the context's" if demonstrations else "the context"
        return rest, [f"the system message is {whose} and was taken out"]
    notes = ["a system message of its own stays with the request"] if own else []
    notes += ["the context's demonstrations were taken out"] if taken else []
    if not instructions:
        return [*front, *rest], notes
    text = _spaced(instructions["content"])
    if own and text in _spaced(own["content"]):
        raise InputError(
            f"{source}: a row's system message must not hold the context, which the student must "
            f"not see, got all of it and more; keep only what is this request's own"
        )
    if any(text in _spaced(m["content"]) for m in rest):
        notes.append("the context's text stands in the request as well, where the student sees it")
    return [*front, *rest], notes


def _check_begins(turns: Sequence[Message], demonstrations: Sequence[Message], source: str) -> None:
    """Raise InputError for a request whose first exchange is one of the demonstrations."""
    size = 1 if turns[0]["role"] == "assistant" else 2
    while size < len(turns) and is_tool_turn(turns[size - 1]):  # up to the answer
        size += 1
    for i in range(len(demonstrations) - size + 1) if len(turns) > size else ():
        if all(map(_same, turns[:size], demonstrations[i : i + size])):
            raise InputError(
                f"{source}: a request must begin with all demonstrations of its context, in their "
                f"order, which are then taken out, or with none, which the student would see, got "
                f"{turns[0]['content'][:40]!r} alone or in another place; remove it from the row"
            )


def check_contexts(parts: Mapping[str, Sequence[Example]], contexts: Contexts) -> None:
    """Raise InputError if an example names none of several contexts, or one where there is none."""
    for example in (e for examples in parts.values() for e in examples):
        if example.context not in contexts:
            names = ", ".join(sorted(filter(None, contexts)))
            what = f'"context" must be one of {names}' if names else 'there must be no "context"'
            fix = "name one" if names else "leave it out, or give the contexts a name each"
            if len(example.context.split()) > 3:
                fix = "text that a request is about belongs into its prompt"
            raise InputError(f"{example.source}: {what}, got {example.context[:60]!r}; {fix}")


def check_disjoint(parts: Mapping[str, Sequence[Example]], contexts: Contexts) -> None:
    """Raise InputError, with all of them named, if a prompt stands in two parts, or among the
    demonstrations of its context.

    A scorecard on prompts that were trained on, or shown to the teacher, would flatter. A request
    of several turns is shown where all of them stand in the context one behind the other.
    """
    shown = {name: _turns(split_system(c.messages)[1]) for name, c in contexts.items()}
    seen: dict[str, str] = {}
    found = []
    for examples in parts.values():
        here: dict[str, str] = {}
        for example in examples:
            request = request_of(example)[1]  # behind whatever context: the student sees none
            turns = _turns(split_system(example.messages)[1])
            demonstrations = _demonstrations(shown.get(example.context, ()), len(turns))
            other = seen.get(request) or demonstrations.get(turns)
            if other:
                found.append((example.source, f"is {other} ({example.text[:40]!r})"))
            here.setdefault(request, example.source)
        seen |= here
    if found:
        raise InputError(
            f"training, validation and test prompts must be disjoint from each other and from the "
            f"context's demonstrations, got {_listed(found, 'overlap')}; remove one of each"
        )


def alike_remarks(parts: Mapping[str, Sequence[Example]]) -> list[str]:
    """A line for each part with requests that are trained on behind another system message."""

    trained = {asked_of(example) for example in parts.get("train", ())}
    found = {
        part: sum(asked_of(example) in trained for example in examples)
        for part, examples in parts.items()
        if part != "train"
    }
    return [
        f"{count} of {len(parts[part])} {part} requests are trained on behind another system "
        f"message: they count as others, and may flatter"
        for part, count in found.items()
        if count
    ]


def also_in(examples: Sequence[Example], parts: Mapping[str, Sequence[Example]]) -> list[Example]:
    """Those whose request stands in some part as well, behind whatever context."""
    known = {request_of(e)[1] for part in parts.values() for e in part}
    return [e for e in examples if request_of(e)[1] in known]


@lru_cache(maxsize=64)
def _demonstrations(shown: Turns, length: int) -> dict[Turns, str]:
    """The conversations of so many turns that a context shows, up to what the assistant answers."""
    ends = [i for i, (role, _) in enumerate(shown, start=1) if role in ("user", "tool")]
    users = [sum(role == "user" for role, _ in shown[:end]) for end in ends]
    return {
        shown[end - length : end]: f"demonstration {number} of the context"
        for number, end in zip(users, ends, strict=True)
        if end >= length
    }


def check_same_answers(examples: Sequence[Example]) -> None:
    """Raise InputError if equal prompts of one part have different accepted answers."""
    first: dict[tuple[str, str], Example] = {}
    found = []
    for example in examples:
        other = first.setdefault(_request_of(example, _spaced), example)
        if set(other.answers) != set(example.answers):
            said = f"{list(example.answers)} and {other.source} {list(other.answers)}"
            found.append((example.source, f"{said} ({example.text[:40]!r})"))
    if found:
        raise InputError(
            f"equal prompts must have equal answers, got {_listed(found, 'contradiction')}; "
            f"correct one of each, or accept both in a list"
        )


def repeat_remarks(examples: Sequence[Example]) -> list[str]:
    """A line on requests of one part that stand there before: each of them counts."""
    first: set[tuple[str, str]] = set()
    repeated = []
    for example in examples:
        request = _request_of(example, _spaced)
        if request in first:
            repeated.append(example.source)
        first.add(request)
    if not repeated:
        return []
    path = Path(repeated[0].rpartition(":")[0]).name
    rows = "1 row repeats a request" if len(repeated) == 1 else f"{len(repeated)} rows repeat one"
    return [f"{path}: {rows} that stands above, first {repeated[0]}; each of them counts"]


def request_of(example: Example) -> tuple[str, str]:
    """What makes two requests the same in what they ask."""
    return _request_of(example, _normalised)


def asked_of(example: Example) -> str:
    """The same behind whatever context, and whatever system message of a request's own."""
    return request_of(replace(example, messages=tuple(split_system(example.messages)[1])))[1]


def _request_of(example: Example, normalise: Callable[[str], str]) -> tuple[str, str]:
    return example.context, "\n".join(normalise(words_of(m)) for m in example.messages)


def _listed(found: Sequence[tuple[str, str]], what: str) -> str:
    """The first mistakes with what is wrong, all others by their places alone."""
    count = f"{len(found)} {what}{'s' if len(found) > 1 else ''}"
    listed = [f"{source} {said}" for source, said in found[:SHOWN]]
    lines: dict[str, list[str]] = {}
    for source, _ in found[SHOWN:]:
        path, _, line = source.rpartition(":")
        lines.setdefault(path, []).append(line)
    if lines:
        others = "; ".join(f"{path}:{', '.join(numbers)}" for path, numbers in lines.items())
        listed.append(f"and {len(found) - SHOWN} more at {others}")
    return f"{count}: {'; '.join(listed)}"


def _turns(messages: Sequence[Message]) -> Turns:
    return tuple((message["role"], _normalised(words_of(message))) for message in messages)


def _normalised(text: str) -> str:
    return folded(normalised(text))


@lru_cache(maxsize=4096)  # a long context is compared with every row
def _spaced(text: str) -> str:
    return " ".join(text.split())


def _same(one: Message, other: Message) -> bool:
    """Whether two messages say the same, white space and the ids of calls aside."""
    return (
        one["role"] == other["role"]
        and _spaced(one["content"]) == _spaced(other["content"])
        and calls_text(calls_of(one)) == calls_text(calls_of(other))
    )


def _accepted(row: Row, source: str) -> tuple[tuple[str, ...], list[str]]:
    """The answers that count as right, and where they were found."""
    if row.answers:
        return row.answers, [*row.answer_notes, *_left_out(row)]
    if row.calls:
        return (calls_text(row.calls),), [f"the calls of {row.origin} are the answer, as JSON"]
    if not row.completion:
        return (), []
    answer = split_thought(row.completion).answer
    if not answer:
        raise InputError(
            f"{source}: an answer must stand behind its reasoning, got nothing behind it; add it, "
            f"or remove the row"
        )
    return (answer,), [f"{row.origin} is the answer"]


def _left_out(row: Row) -> list[str]:
    return [f"{row.origin} left out"] if row.origin else []


def row_remarks(path: str, forms: Counter[str], notes: Counter[str], unused: set[str]) -> list[str]:
    """One line on how a file was read; none if its rows are plain and wholly used."""
    count = forms.total()
    said = [note if n == count else f"{note} ({n} of {count})" for note, n in notes.items()]
    if unused:
        said.append(f"columns left out: {', '.join(sorted(unused))}")
    if not said and set(forms) == {""}:
        return []
    kinds = [f"{n} {form or 'plain'} row{'s' if n > 1 else ''}" for form, n in forms.items()]
    return [f"{Path(path).name}: {'; '.join([', '.join(kinds), *said])}"]
