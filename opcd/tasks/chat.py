"""Chat messages to token ids, for the student (without the context) and the teacher (with it)."""

from collections.abc import Sequence
from itertools import groupby

from opcd.errors import InputError
from opcd.scoring.reasoning import MARKS, opened_thought
from opcd.tasks.kept import check_behind, check_kept, without_thoughts
from opcd.tasks.messages import Message, split_system, system, user
from opcd.tasks.template import REQUEST, Template
from opcd.tasks.turn import completion_text

APART = "\n\n"  # between texts that share a message


class Chat:
    """Renders requests with or without the context in front.

    `placement` is where the context's system message goes: in a system message ("system"), or in
    front of the first user message ("user"), for templates without a system role; "auto" takes the
    first that the template takes. `without_context` is what stands in its place for the student:
    whatever the template writes by itself ("default"), an empty system message ("none"), or a text.

    A request's own system message stays for both models, behind the context; `own_system` says that
    there are such requests.

    Raises InputError for a template that refuses or drops what it is given, or that opens the
    answer differently behind the context.
    """

    def __init__(
        self,
        template: Template,
        context: Sequence[Message],
        placement: str = "auto",
        without_context: str = "default",
        own_system: bool = False,
    ) -> None:
        self.template = template
        self.context = list(context)
        self.without_context = without_context
        self.placement = self._find_placement(placement, own_system)
        self._thought = opened_thought(template.text(self.student_messages([user(REQUEST)])))
        self._marks = {
            number: token.content
            for number, token in template.tokenizer.added_tokens_decoder.items()
            if token.special and token.content in MARKS
        }

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the request as the student sees it, up to where the answer starts.

        Raises InputError if the template drops one of several messages.
        """
        if len(messages) > 1:
            check_kept(self.template, without_thoughts(messages), self.student_messages)
        return self.template.ids(self.student_messages(messages))

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of context and request as the teacher sees them.

        Raises InputError for a request's own system message that does not stay behind the context,
        and if the template drops one of several messages, or the context in front of them.
        """
        own, rest = split_system(messages)
        if own is not None:
            self._check_behind(own, rest, self.placement)
        if len(rest) > 1:
            shown, front = len(self.context), messages[: len(messages) - len(rest)]
            check_kept(
                self.template,
                [*self.context, *without_thoughts(rest)],
                lambda m: behind(m[:shown], [*front, *m[shown:]], self.placement),
            )
        return self.template.ids(self.teacher_messages(messages))

    def completion_ids(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of a completion that was given as text, and of what ends it.

        Tokenized behind its request: alone, many tokenizers put a space in front.

        Raises InputError for a text that the template's turns have no place for.
        """
        encode, text = self.template.encode, completion_text(text, self.template)
        opened = self.template.text(self.student_messages(messages))
        before, whole = encode(opened), encode(opened + text)
        behind = whole[: len(before)] == before
        return [
            *(whole[len(before) :] if behind else encode(text)),
            *self.template.stop_ids[-1:],
        ]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The completion's text without surrounding white space.

        Without special tokens, but for the marks of a thought; a thought that the template opens
        begins with its mark.
        """
        text = self._thought
        for mark, ids in groupby(token_ids, self._marks.get):
            piece = list(ids)
            plain = self.template.tokenizer.decode(piece, skip_special_tokens=True)
            text += plain if mark is None else mark * len(piece)
        return text.strip()

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """The completion's text as it was sampled, with special tokens."""
        return self.template.tokenizer.decode(token_ids)

    @property
    def stand_in(self) -> str:
        """What the student's prompts begin with, in front of the request."""
        return self.template.text(self.student_messages([user(REQUEST)])).partition(REQUEST)[0]

    @property
    def dated(self) -> bool:
        """Whether the template writes today's date, for either model."""
        request = [user(REQUEST)]
        sides = (self.student_messages(request), self.teacher_messages(request))
        return any(self.template.dated(messages) for messages in sides)

    def student_messages(self, messages: Sequence[Message]) -> list[Message]:
        """A request without the context."""
        own, rest = split_system(messages)
        texts = [own["content"]] if own else []
        if self.without_context not in ("default", "none"):
            texts = [self.without_context, *texts]
        if texts or self.without_context == "default" or not self.template.takes_system:
            return self._with_system(texts, rest)
        return self._with_system([""], rest)  # an empty one, in place of the template's default

    def teacher_messages(self, messages: Sequence[Message]) -> list[Message]:
        """A request behind the context."""
        return behind(self.context, messages, self.placement)

    def _with_system(self, texts: Sequence[str], rest: Sequence[Message]) -> list[Message]:
        """Texts where the template takes a system message, or in front of the request."""
        if not self.template.takes_system:
            return _in_front(texts, rest)
        return [system(APART.join(texts)), *rest] if texts else list(rest)

    def _find_placement(self, wanted: str, own_system: bool) -> str:
        """The first that the template takes. Raises InputError where there is none."""
        if wanted == "user":
            self._check("user", own_system)
            return "user"
        try:
            self._check("system", own_system)
        except InputError as refused:
            try:
                self._check("user", own_system)
            except InputError:
                raise refused from None
            if wanted == "system":
                raise InputError(f"{refused}; or set context_placement to user") from refused
            return "user"
        return "system"

    def _check(self, placement: str, own_system: bool) -> None:
        template, request = self.template, [user(REQUEST)]
        check_kept(template, self.context, lambda marked: behind(marked, request, placement))
        if own_system:
            self._check_behind(system("The customer is Ms Ng."), request, placement)
        texts = {
            "the request": template.text(self.student_messages(request)),
            "the request behind the context": template.text(
                behind(self.context, request, placement)
            ),
        }
        for what, text in texts.items():
            if text.count(REQUEST) != 1:
                raise InputError(
                    f"the chat template of {template.name!r} must keep {what} as it is, but drops "
                    f"or alters it; name a file with another as chat_template"
                )
        alone, prompted = texts.values()
        if self.without_context not in ("default", "none") and self.without_context not in alone:
            raise InputError(
                f"the chat template of {template.name!r} must keep the text of without_context, "
                f"but drops or alters {self.without_context[:60]!r}; pass default"
            )
        ends = [text.partition(REQUEST)[2] for text in (alone, prompted)]
        if ends[0] != ends[1]:
            raise InputError(
                f"the chat template of {template.name!r} must open the answer the same way with "
                f"and without the context, got {ends[1]!r} and {ends[0]!r}; pass "
                f"chat_template_args (for thinking models often enable_thinking=false) so that "
                f"they agree"
            )

    def _check_behind(self, own: Message, rest: Sequence[Message], placement: str) -> None:
        """Raise InputError if a request's own system message does not stay behind the context."""
        check_behind(
            self.template,
            [*self.context, own],
            lambda m: behind(m[:-1], [m[-1], *rest], placement),
        )


def behind(context: Sequence[Message], request: Sequence[Message], placement: str) -> list[Message]:
    """A request behind the context, whose system message stands as `placement` says."""
    own, rest = split_system(request)
    instructions, demonstrations = split_system(context)
    if placement == "user":
        if own:
            rest = _in_front([own["content"]], rest)
        texts = [instructions["content"]] if instructions else []
        return _in_front(texts, [*demonstrations, *rest])
    if own and instructions and not demonstrations:
        return [system(APART.join([instructions["content"], own["content"]])), *rest]
    return [*context, *request]


def _in_front(texts: Sequence[str], messages: Sequence[Message]) -> list[Message]:
    """Texts in front of what the first user message says."""
    joined = list(messages)
    for i, message in enumerate(messages):
        if message["role"] == "user":
            joined[i] = user(APART.join([*texts, message["content"]]))
            break
    return joined
