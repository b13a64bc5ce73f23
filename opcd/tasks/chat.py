"""Chat messages to token ids, for the student (without the context) and the teacher (with it)."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.tasks.data import Example, Message
from opcd.tasks.reasoning import MARKS, opened_thought


class Chat:
    """Renders prompts with the tokenizer's chat template, with or without the context in front.

    Raises InputError for a tokenizer without a template, and for a template that refuses or drops
    the context or that opens the answer differently behind the context.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        context: Sequence[Message],
        template_args: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.context = list(context)
        self.template_args = template_args or {}
        reserved = {"conversation", "messages", "tokenize", "add_generation_prompt"}
        if taken := sorted(reserved & set(self.template_args)):
            raise InputError(
                f"chat_template_args must name arguments of the template's own, got "
                f"{', '.join(taken)}; leave that out"
            )
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {tokenizer.name_or_path!r} must have a chat template, got none; "
                f"use an instruct model, or set tokenizer.chat_template and save it"
            )
        self._check_template()
        probe = self._text([{"role": "user", "content": "Hm?"}], generation_prompt=True)
        self._thought = opened_thought(probe)
        self._marks = {
            number: token.content
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.special and token.content in MARKS
        }

    def student_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the prompt as the student sees it, up to where the answer starts."""
        return self._ids(messages)

    def teacher_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of context and prompt as the teacher sees them."""
        return self._ids([*self.context, *messages])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The completion's text without surrounding white space.

        Without special tokens, but for the marks of a thought; a thought that the template opens
        begins with its mark.
        """
        text = self._thought
        for mark, ids in groupby(token_ids, self._marks.get):
            piece = list(ids)
            plain = self.tokenizer.decode(piece, skip_special_tokens=True)
            text += plain if mark is None else mark * len(piece)
        return text.strip()

    def decode_raw(self, token_ids: Sequence[int]) -> str:
        """The completion's text as it was sampled, with special tokens."""
        return self.tokenizer.decode(token_ids)

    def _ids(self, messages: Sequence[Message]) -> list[int]:
        text = self._text(messages, generation_prompt=True)
        # The template writes the special tokens itself.
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text(self, messages: Sequence[Message], generation_prompt: bool, **overrides: Any) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.template_args | overrides,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(
                f"the chat template of {self.tokenizer.name_or_path!r} must accept these messages, "
                f"but it rejects their roles ({', '.join(m['role'] for m in messages[:4])}, ...): "
                f"{error}; write the context as a .json list of the roles that it takes, with the "
                f"instructions inside the first user message"
            ) from error
        assert isinstance(text, str)
        return text

    def _check_template(self) -> None:
        probe = [{"role": "user", "content": "What is this?"}]
        name = self.tokenizer.name_or_path
        behind = self._text([*self.context, *probe], generation_prompt=True)
        template = self.tokenizer.get_chat_template()
        if "strftime_now" in template:
            clockless = template.replace("strftime_now", "raise_exception")
            try:
                self._text([*self.context, *probe], True, chat_template=clockless)
            except InputError as error:
                raise InputError(
                    f"the chat template of {name!r} must give the same text every day, but it "
                    f"writes today's date; fix the date with chat_template_args, often "
                    f"{{date_string: ...}}"
                ) from error
        for message in self.context:
            if message["content"].strip() not in behind:
                raise InputError(
                    f"the chat template of {name!r} must keep every message of the context, but it "
                    f"drops or alters the {message['role']} message "
                    f"{message['content'][:60]!r}; write it in another role"
                )
        alone = self._text(probe, generation_prompt=True)
        ends = []
        for text, messages in ((alone, probe), (behind, [*self.context, *probe])):
            without = self._text(messages, generation_prompt=False)
            if not text.startswith(without):
                raise InputError(
                    f"the chat template of {name!r} must only append when it opens the answer, but "
                    f"it rewrites earlier text; pass chat_template_args that switch this off"
                )
            ends.append(text[len(without) :])
        if ends[0] != ends[1]:
            raise InputError(
                f"the chat template of {name!r} must open the answer the same way with and without "
                f"the context, got {ends[1]!r} and {ends[0]!r}; pass chat_template_args (for "
                f"thinking models often enable_thinking=false) so that they agree"
            )


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
