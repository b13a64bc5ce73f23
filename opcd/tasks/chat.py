"""Chat messages to token ids, for the student (without the context) and the teacher (with it)."""

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

from opcd.errors import InputError
from opcd.scoring.reasoning import MARKS, opened_thought
from opcd.tasks.kept import behind_last, check_behind, check_kept, holds_text, without_thoughts
from opcd.tasks.messages import Message, split_system, system, user, words_of
from opcd.tasks.template import REQUEST, Template
from opcd.tasks.tools import Tool, arguments_of, names_of
from opcd.tasks.turn import completion_text, turn_text

APART = "\n\n"  # between texts that share a message


class Chat:
    """Renders requests with or without the context in front.

    `placement` is where the context's system message goes: in a system message ("system"), or in
    front of the first user message ("user"), for templates without a system role; "auto" takes the
    first that the template takes. `without_context` is what stands in its place for the student:
    whatever the template writes by itself ("default"), an empty system message ("none"), or a text.

    A request's own system message stays for both models, behind the context; `own_system` says that
    there are such requests. `tools` are the context's: the template writes them for the teacher.

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
        tools: Sequence[Tool] = (),
    ) -> None:
        self.template = template
        self.context = list(context)
        self.tools = list(tools)
        self.without_context = without_context
        if tools:
            self._check_tools()
        self.placement = self._find_placement(placement, own_system)
        self._thought = opened_thought(template.text(self.student_messages([user(REQUEST)])))
        self._marks = {
            number: token.content
            for number, token in template.tokenizer.added_tokens_decoder.items()
            if token.special and token.content in MARKS
        }

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the request as the student sees it, up to where the answer starts.

        Raises InputError if the template drops one of several messages, or opens the answer to what
        a tool gave with another thought than one to the user.
        """
        if len(messages) > 1:
            text = self._marked_alone(messages)
            if messages[-1]["role"] == "tool" and opened_thought(text) != self._thought:
                raise InputError(
                    f"the chat template of {self.template.name!r} must open a thought behind what "
                    f"a tool gave as it does behind the user's message, got "
                    f"{opened_thought(text)!r} and {self._thought!r}; pass chat_template_args "
                    f"(often enable_thinking=false) so that they agree"
                )
        return self.template.ids(self.student_messages(messages))

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of context and request as the teacher sees them.

        Raises InputError for a request's own system message that does not stay behind the context,
        if the template drops one of several messages, or the context in front of them, if it opens
        the answer to several otherwise than for the student, and for tools that no user message
        follows.
        """
        own, rest = split_system(messages)
        if own is not None:
            self._check_behind(own, rest, self.placement)
        if self.tools and rest[0]["role"] != "user" and not split_system(self.context)[1]:
            raise InputError(
                "a request behind a context with tools must begin with a user message, in which "
                "some chat templates write the tools, got the assistant's; remove it"
            )
        if len(rest) > 1:
            text = self._marked_prompted(messages)
            alone = behind_last(self._marked_alone(messages), len(messages))
            self._check_ends(alone, behind_last(text, len(self.context) + len(rest)))
        return self.template.ids(self.teacher_messages(messages), self.tools)

    def completion_ids(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of a completion that was given as text, and of what ends it.

        Tokenized behind its request: alone, many tokenizers put a space in front.

        Raises InputError for a text that the template's turns have no place for.
        """
        request, template = self.student_messages(messages), self.template
        if messages[-1]["role"] == "tool":
            opened, usual = template.opened(request), template.opened([user(REQUEST)])
            if opened != usual:
                raise InputError(
                    f"a completion as text behind what a tool gave needs a chat template that "
                    f"opens it as it does behind the user's message, but that of "
                    f"{template.name!r} opens with {opened!r} and {usual!r}; pass "
                    f"completion_token_ids"
                )
        text = completion_text(text, template)
        (ids,) = template.continued(template.text(request), [text])
        return [*ids, *template.stop_ids[-1:]]

    def call_ids(
        self, messages: Sequence[Message], turn: Message, stop_ids: Collection[int]
    ) -> list[int]:
        """Token ids of a turn that calls tools as the template writes it, up to what ends it.

        Raises InputError where the template drops some of it, or writes it otherwise behind the
        context, or without one of `stop_ids` at its end; and for a turn that spells one of them.
        """
        template, request = self.template, self.student_messages(messages)
        text = turn_text(turn, request, template)
        prompted = turn_text(turn, self.teacher_messages(messages), template, self.tools)
        if prompted != text:
            raise InputError(
                f"the chat template of {template.name!r} must write calls the same way with and "
                f"without the context's tools, got {prompted!r:.100} and {text!r:.100}; pass "
                f"completion_token_ids, or name a file with another template as chat_template"
            )
        spelled = template.tokenizer.convert_ids_to_tokens(list(stop_ids))
        if found := [token for token in spelled if token in words_of(turn)]:
            raise InputError(
                f"a completion must end with what ends it, got {found[0]} within it; remove that"
            )
        (ids,) = template.continued(template.text(request), [text])
        ends = [i for i, token in enumerate(ids) if token in stop_ids]
        if not ends:
            raise InputError(
                f"the chat template of {template.name!r} must end a turn of calls with a token "
                f"that ends a completion ({', '.join(spelled)}), got {text[-60:]!r}; pass "
                f"completion_token_ids"
            )
        return ids[: ends[0] + 1]

    def decode(self, token_ids: Sequence[int], cut: Callable[[str], str] = str) -> str:
        """The completion's text without surrounding white space, or what `cut` leaves of it.

        As `plain_text`; a thought that the template opens begins with its mark.
        """
        return (self._thought + cut(self.plain_text(token_ids))).strip()

    def within_a_thought(self, text: str) -> str:
        """A text that was cut, with the mark of the thought that the template has opened in front
        of it, where it holds none: servers leave the prompt's out."""
        return text if any(mark in text for mark in MARKS) else self._thought + text

    def plain_text(self, token_ids: Sequence[int]) -> str:
        """What tokens say: without special ones, but for the marks of a thought."""
        text = ""
        for mark, ids in groupby(token_ids, self._marks.get):
            piece = list(ids)
            plain = self.template.tokenizer.decode(piece, skip_special_tokens=True)
            text += plain if mark is None else mark * len(piece)
        return text

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
        request, dated = [user(REQUEST)], self.template.dated
        prompted = self.teacher_messages(request)
        return dated(self.student_messages(request)) or dated(prompted, self.tools)

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

    def holds_tools(self, prefix: Sequence[int], messages: Sequence[Message]) -> bool:
        """Whether the start of a request's prompt holds the schemas of all tools.

        Under another name of the last one it would begin otherwise.
        """
        *others, last = self.tools
        renamed = {**last["function"], "name": f"{last['function']['name']}_zebra"}
        tools = [*others, {**last, "function": renamed}]
        ids = self.template.ids(self.teacher_messages(messages), tools)
        return ids[: len(prefix)] != list(prefix)

    def _marked_alone(self, messages: Sequence[Message]) -> str:
        """What the student sees, with marks. Raises InputError if the template drops of it."""
        return check_kept(self.template, without_thoughts(messages), self.student_messages)

    def _marked_prompted(self, messages: Sequence[Message]) -> str:
        """What the teacher sees, with marks. Raises InputError if the template drops of it, with
        the other placement of the context where that would keep it."""
        own, rest = split_system(messages)
        shown, front = len(self.context), [own] if own else []

        def kept(placement: str) -> str:
            return check_kept(
                self.template,
                [*self.context, *without_thoughts(rest)],
                lambda m: behind(m[:shown], [*front, *m[shown:]], placement),
                self.tools,
            )

        try:
            return kept(self.placement)
        except InputError as refused:
            if self.placement == "user":
                raise
            try:
                kept("user")
            except InputError:
                raise refused from None
            raise InputError(f"{refused}; or set context_placement to user") from refused

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

    def _check_tools(self) -> None:
        """Raise InputError for a template that does not write the tools, all of them with the names
        of their arguments."""
        template, request = self.template, [user(REQUEST)]
        text = template.text(request, tools=self.tools)
        if text == template.text(request):
            raise InputError(
                f"the chat template of {template.name!r} must write the context's tools, but its "
                f"text is the same without them; name a file with another template as "
                f"chat_template, or describe the tools in the system message"
            )
        parts = [(name, name) for name in names_of(self.tools)]
        parts += [(f"{name} of {tool}", name) for tool, name in arguments_of(self.tools)]
        if dropped := [what for what, name in parts if not holds_text(text, name)]:
            raise InputError(
                f"the chat template of {template.name!r} must write the context's tools, but it "
                f"drops {', '.join(dropped)}; name a file with another template as chat_template"
            )

    def _check(self, placement: str, own_system: bool) -> None:
        template, request = self.template, [user(REQUEST)]
        check_kept(
            template, self.context, lambda marked: behind(marked, request, placement), self.tools
        )
        if own_system:
            self._check_behind(system("The customer is Ms Ng."), request, placement)
        context = "the context and its tools" if self.tools else "the context"
        texts = {
            "the request": template.text(self.student_messages(request)),
            f"the request behind {context}": template.text(
                behind(self.context, request, placement), tools=self.tools
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
        self._check_ends(*(text.partition(REQUEST)[2] for text in (alone, prompted)))

    def _check_ends(self, alone: str, prompted: str) -> None:
        """Raise InputError where other text follows a request behind the context than without."""
        if alone == prompted:
            return
        behind_it = ", or name a file with a template that writes the tools in front of the request"
        raise InputError(
            f"the chat template of {self.template.name!r} must open the answer the same way with "
            f"and without the context, got {prompted!r} and {alone!r}; pass "
            f"chat_template_args (for thinking models often enable_thinking=false) so that "
            f"they agree{behind_it if self.tools else ''}"
        )

    def _check_behind(self, own: Message, rest: Sequence[Message], placement: str) -> None:
        """Raise InputError if a request's own system message does not stay behind the context."""
        check_behind(
            self.template,
            [*self.context, own],
            lambda m: behind(m[:-1], [m[-1], *rest], placement),
            self.tools,
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
