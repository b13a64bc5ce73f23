"""Chat messages to token ids, for the student (without the context) and the teacher (with it)."""

from collections.abc import Sequence
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.scoring.reasoning import MARKS, opened_thought
from opcd.tasks.data import Example
from opcd.tasks.messages import Message
from opcd.tasks.template import REQUEST, Template

APART = "\n\n"  # between texts that share a message


class Chat:
    """Renders requests with or without the context in front.

    `placement` is where the context's system message goes: in a system message ("system"), or in
    front of the first user message ("user"), for templates without a system role; "auto" takes the
    first that the template takes. `without_context` is what stands in its place for the student:
    whatever the template writes by itself ("default"), an empty system message ("none"), or a text.

    A request's own system message stays for both models, behind the context.

    Raises InputError for a template that refuses or drops what it is given, or that opens the
    answer differently behind the context.
    """

    def __init__(
        self,
        template: Template,
        context: Sequence[Message],
        placement: str = "auto",
        without_context: str = "default",
    ) -> None:
        self.template = template
        self.context = list(context)
        self.without_context = without_context
        self.placement = self._find_placement(placement)
        self._thought = opened_thought(template.text(self.student_messages([_user(REQUEST)])))
        self._marks = {
            number: token.content
            for number, token in template.tokenizer.added_tokens_decoder.items()
            if token.special and token.content in MARKS
        }

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the request as the student sees it, up to where the answer starts."""
        return self.template.ids(self.student_messages(messages))

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of context and request as the teacher sees them.

        Raises InputError for a request's own system message that does not stay behind the context.
        """
        own, _ = _parted(messages)
        if own is not None:
            self._check_behind(own, self.template.text(self.teacher_messages(messages)))
        return self.template.ids(self.teacher_messages(messages))

    def completion_ids(self, messages: Sequence[Message], text: str) -> list[int]:
        """Token ids of a completion that was given as text, and of what ends it.

        Tokenized behind its request: alone, many tokenizers put a space in front.
        """
        encode, request = self.template.encode, self.student_messages(messages)
        opened = self.template.text(request)
        before, whole = encode(opened), encode(opened + text)
        behind = whole[: len(before)] == before
        return [*(whole[len(before) :] if behind else encode(text)), *self.template.stop_ids[-1:]]

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
        return self.template.text(self.student_messages([_user(REQUEST)])).partition(REQUEST)[0]

    @property
    def dated(self) -> bool:
        """Whether the template writes today's date, for either model."""
        request = [_user(REQUEST)]
        sides = (self.student_messages(request), self.teacher_messages(request))
        return any(self.template.dated(messages) for messages in sides)

    def student_messages(self, messages: Sequence[Message]) -> list[Message]:
        """A request without the context."""
        own, rest = _parted(messages)
        texts = [own["content"]] if own else []
        if self.without_context not in ("default", "none"):
            texts = [self.without_context, *texts]
        if texts or self.without_context == "default" or not self.template.takes_system:
            return self._with_system(texts, rest)
        return self._with_system([""], rest)  # an empty one, in place of the template's default

    def teacher_messages(
        self, messages: Sequence[Message], placement: str | None = None
    ) -> list[Message]:
        """A request behind the context."""
        own, rest = _parted(messages)
        instructions, demonstrations = _parted(self.context)
        if (placement or self.placement) == "user":
            if own:
                rest = _in_front([own["content"]], rest)
            texts = [instructions["content"]] if instructions else []
            return _in_front(texts, [*demonstrations, *rest])
        if own and instructions and not demonstrations:
            return [_system([instructions["content"], own["content"]]), *rest]
        return [*self.context, *messages]

    def _with_system(self, texts: Sequence[str], rest: Sequence[Message]) -> list[Message]:
        """Texts where the template takes a system message, or in front of the request."""
        if not self.template.takes_system:
            return _in_front(texts, rest)
        return [_system(texts), *rest] if texts else list(rest)

    def _find_placement(self, wanted: str) -> str:
        """The first that the template takes. Raises InputError where there is none."""
        if wanted == "user":
            self._check("user")
            return "user"
        try:
            self._check("system")
        except InputError as refused:
            try:
                self._check("user")
            except InputError:
                raise refused from None
            if wanted == "system":
                raise InputError(f"{refused}; pass --context_placement user") from refused
            return "user"
        return "system"

    def _check(self, placement: str) -> None:
        template, request = self.template, [_user(REQUEST)]
        behind = template.text(self.teacher_messages(request, placement))
        alone = template.text(self.student_messages(request))
        for message in self.context:
            self._check_kept(message, behind)
        for text, what in ((alone, "the request"), (behind, "the request behind the context")):
            if text.count(REQUEST) != 1:
                raise InputError(
                    f"the chat template of {template.name!r} must keep {what} as it is, but drops "
                    f"or alters it; pass another template with --chat_template"
                )
        if self.without_context not in ("default", "none") and self.without_context not in alone:
            raise InputError(
                f"the chat template of {template.name!r} must keep the text of without_context, "
                f"but drops or alters {self.without_context[:60]!r}; pass default"
            )
        ends = [text.partition(REQUEST)[2] for text in (alone, behind)]
        if ends[0] != ends[1]:
            raise InputError(
                f"the chat template of {template.name!r} must open the answer the same way with "
                f"and without the context, got {ends[1]!r} and {ends[0]!r}; pass "
                f"chat_template_args (for thinking models often enable_thinking=false) so that "
                f"they agree"
            )

    def _check_behind(self, own: Message, text: str) -> None:
        place = text.find(own["content"].strip())
        last = max((text.find(m["content"].strip()) for m in self.context), default=-1)
        if place <= last:
            raise InputError(
                f"a system message of a request's own must stand behind the context, but the chat "
                f"template of {self.template.name!r} puts it in front of it or drops it: "
                f"{own['content'][:60]!r}; put it into the user's message"
            )

    def _check_kept(self, message: Message, text: str) -> None:
        content = message["content"].strip()
        if content in text:
            return
        behind_reasoning = content.rpartition("</think>")[2].strip()
        if behind_reasoning != content and behind_reasoning in text:
            advice = "write that answer without its reasoning"
        else:
            advice = "write it in another role"
        raise InputError(
            f"the chat template of {self.template.name!r} must keep every message of the context, "
            f"but it drops or alters the {message['role']} message {content[:60]!r}; {advice}"
        )


def _parted(messages: Sequence[Message]) -> tuple[Message | None, list[Message]]:
    """The system message in front, if there is one, and the rest."""
    if messages and messages[0]["role"] == "system":
        return messages[0], list(messages[1:])
    return None, list(messages)


def _in_front(texts: Sequence[str], messages: Sequence[Message]) -> list[Message]:
    """Texts in front of what the first user message says."""
    joined = list(messages)
    for i, message in enumerate(messages):
        if message["role"] == "user":
            joined[i] = _user(APART.join([*texts, message["content"]]))
            break
    return joined


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _system(texts: Sequence[str]) -> Message:
    return {"role": "system", "content": APART.join(texts)}


def check_lengths(
    examples: Sequence[Example],
    lengths: Sequence[int],  # tokens of each example, rendered with the context
    max_completion_tokens: int,
    max_positions: int | None,
    context_tokens: int,
) -> None:
    """Raise InputError if context, prompt and completion exceed the model's positions."""
    if max_positions is None or not lengths:
        return
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    total = lengths[longest] + max_completion_tokens
    if total > max_positions:
        raise InputError(
            f"context, prompt and completion must fit the model's {max_positions} positions, got "
            f"{context_tokens} + {lengths[longest] - context_tokens} + {max_completion_tokens} = "
            f"{total} tokens for {examples[longest].source}; shorten the context or that prompt, "
            f"or lower max_completion_tokens (nothing is cut silently)"
        )


def check_same_tokenizer(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> None:
    """Raise InputError if both models do not turn the same text into the same token ids."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    text = "Distil 3,14 naïve things:\n\tdef f(x): return x  # ok 日本語 🙂"
    same = student(text)["input_ids"] == teacher(text)["input_ids"]
    if ours != theirs or not same:
        differing = len(set(ours.items()) ^ set(theirs.items()))
        raise InputError(
            f"teacher and student must share one tokenizer, got {len(ours)} and {len(theirs)} "
            f"tokens of which {differing} entries differ ({student.name_or_path!r}, "
            f"{teacher.name_or_path!r}); choose a teacher of the student's family"
        )
