"""A recorded conversation as token ids: its assistant turns are scored, nothing else of it.

Behind what the context changes, up to where the first scored turn is opened, both models are given
the same ids. A turn is all that stands behind its generation prompt, up to and with the token that
ends it, as a model would have sampled it there; what stands between two turns is tokenized apart.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import chain
from typing import NamedTuple

from opcd.episodes import Span
from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.conversation import learned_turns
from opcd.tasks.data import Example
from opcd.tasks.kept import check_kept, without_thoughts
from opcd.tasks.messages import Message, words_of
from opcd.tasks.template import Template, same_start
from opcd.tasks.tools import Tool

SHOWN = 60  # characters of a spelling, from where two differ
ADVICE = (
    "name a file with another template as chat_template, pass chat_template_args (for thinking "
    "models often enable_thinking=false), write the turns without their thoughts, or set source to "
    "sampled"
)


class WrittenOtherwise(InputError):
    """A turn that is not written as it is where it is the last one."""


class Recorded(NamedTuple):
    """A conversation up to the end of its last assistant turn, or up to that of another one."""

    student_ids: list[int]  # without the context
    teacher_ids: list[int]  # with all of it
    spans: list[Span]  # the assistant turns that are scored


def recorded_ids(chat: Chat, example: Example, stop_ids: Collection[int]) -> list[Recorded]:
    """Token ids of an example's conversation, and where its assistant turns stand.

    One sequence with all turns, where the template writes each of them as it writes the last one.
    Else one for each turn, which is its last: earlier turns are then what a model sees of them in
    use, such as without their thoughts, and nothing is scored of them.

    Raises InputError, which names the example's place, for a template that writes what follows the
    context otherwise behind it, or a turn otherwise than it opens an answer; that drops some of a
    turn, or ends it without one of `stop_ids`; and for a turn that spells one of them.
    """
    messages = example.conversation
    turns = learned_turns(messages, example.source)
    try:
        try:
            return [_sequence(chat, messages, turns, stop_ids)]
        except WrittenOtherwise:
            return [_sequence(chat, messages[: turn + 1], [turn], stop_ids) for turn in turns]
    except InputError as error:
        raise InputError(f"{example.source}: {error}") from error


def _sequence(
    chat: Chat, messages: Sequence[Message], turns: Sequence[int], stop_ids: Collection[int]
) -> Recorded:
    """Messages up to the last of the turns, of which those are scored."""
    template = chat.template
    student = _View(template, chat.student_messages)
    teacher = _View(template, chat.teacher_messages, chat.tools)
    if chat.placement == "system":
        teacher.advice = f"set context_placement to user, {ADVICE}"
    alone, prompted = student.answered(messages), teacher.answered(messages)
    starts = [student.start(messages, i, alone) for i in turns]
    theirs = [teacher.start(messages, i, prompted) for i in turns]
    for start, their in [*zip(starts, theirs, strict=True), (len(alone), len(prompted))]:
        _check_same(
            template,
            "what follows the context the same way with and without it",
            prompted[theirs[0] : their],
            alone[starts[0] : start],
            teacher.advice,
        )
    ends = [
        student.end(messages, i, alone, start, stop_ids)
        for i, start in zip(turns, starts, strict=True)
    ]
    pieces = [alone[starts[0] : ends[0]]]  # turns, and what stands between them
    for end, start, next_end in zip(ends, starts[1:], ends[1:], strict=False):
        pieces += [alone[end:start], alone[start:next_end]]
    found = template.continued(alone[: starts[0]], pieces)
    for ids, text in zip(found[::2], pieces[::2], strict=True):
        _check_end(template, ids, text, stop_ids)
    fronts = template.encode(alone[: starts[0]]), template.encode(prompted[: theirs[0]])
    spans, at = [], 0
    for number, ids in enumerate(found):
        if number % 2 == 0:
            spans.append(Span(len(fronts[0]) + at, len(fronts[1]) + at, len(ids)))
        at += len(ids)
    common = list(chain.from_iterable(found))
    return Recorded([*fronts[0], *common], [*fronts[1], *common], spans)


class _View:
    """Conversations as one of the models sees them, as text."""

    def __init__(
        self,
        template: Template,
        arrange: Callable[[Sequence[Message]], list[Message]],
        tools: Sequence[Tool] = (),
    ) -> None:
        self._template = template
        self._arrange = arrange
        self._tools = tools
        self.advice = ADVICE  # where its template does not write them as it must

    def answered(self, messages: Sequence[Message]) -> str:
        """With the last message as the answer."""
        return self._template.text(self._arrange(messages), answered=True, tools=self._tools)

    def start(self, messages: Sequence[Message], i: int, whole: str) -> int:
        """Where turn i begins in the whole text: behind the prompt that it answers."""
        opened = self._template.text(self._arrange(messages[:i]), tools=self._tools)
        if not whole.startswith(opened):
            what = "what stands in front of a recorded turn as it opens an answer there"
            _check_same(self._template, what, whole, opened, self.advice, WrittenOtherwise)
        return len(opened)

    def end(
        self,
        messages: Sequence[Message],
        i: int,
        whole: str,
        start: int,
        stop_ids: Collection[int],
    ) -> int:
        """Where turn i, which begins at `start`, ends in the whole text: behind what ends it."""
        template, turn = self._template, messages[i]
        check_kept(
            template,
            without_thoughts([turn]),
            lambda turns: self._arrange([*messages[:i], *turns]),
            self._tools,
            answered=True,
        )
        spelled = template.tokenizer.convert_ids_to_tokens(list(stop_ids))
        if found := [token for token in spelled if token in words_of(turn)]:
            raise InputError(
                f"a recorded turn must end with what ends it, got {found[0]} within "
                f"{turn['content'][:SHOWN]!r}; remove that"
            )
        last = self.answered(messages[: i + 1])
        what = "an earlier assistant turn as it writes the last one"
        _check_same(template, what, whole[:start], last[:start], self.advice, WrittenOtherwise)
        text = _up_to_end(last[start:], spelled)
        if _bare(turn["content"]) not in _bare(text):
            raise InputError(
                f"the chat template of {template.name!r} must keep all of a recorded turn, but "
                f"writes {text[:SHOWN]!r} for {turn['content'][:SHOWN]!r}; {ADVICE}"
            )
        if not whole.startswith(text, start):
            got = whole[start : start + len(text)]
            _check_same(template, what, got, text, self.advice, WrittenOtherwise)
        return start + len(text)


def _up_to_end(text: str, ends: Sequence[str]) -> str:
    """A text up to and with the first of the tokens that end a turn; all of it where there is none,
    which the token ids then show."""
    found = [(text.find(end), -len(end)) for end in ends if end in text]
    if not found:
        return text
    at, length = min(found)
    return text[: at - length]


def _check_end(
    template: Template, ids: Sequence[int], text: str, stop_ids: Collection[int]
) -> None:
    """Raise InputError if a turn's tokens do not end with the one that ends it, and only there."""
    if [i for i, token in enumerate(ids) if token in stop_ids] != [len(ids) - 1]:
        named = ", ".join(map(str, template.tokenizer.convert_ids_to_tokens(list(stop_ids))))
        raise InputError(
            f"the chat template of {template.name!r} must end an assistant turn with a token that "
            f"ends a completion ({named}), got {text[-SHOWN:]!r}; {ADVICE}"
        )


def _check_same(
    template: Template,
    what: str,
    one: str,
    other: str,
    advice: str,
    kind: type[InputError] = InputError,
) -> None:
    """Raise an error for two spellings, shown from where they differ."""
    if one == other:
        return
    shown = max(0, same_start(one, other) - SHOWN // 3)
    raise kind(
        f"to train on recorded turns the chat template of {template.name!r} must write {what}, got "
        f"{one[shown : shown + SHOWN]!r} and {other[shown : shown + SHOWN]!r}; {advice}"
    )


def _bare(text: str) -> str:
    return "".join(text.split())
