"""A tokenizer's chat template, judged by what it writes and not by what stands in it."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple

import jinja2
from jinja2.ext import loopcontrols
from transformers import PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.scoring.reasoning import split_thought
from opcd.tasks.messages import Message, assistant, system, user
from opcd.tasks.records import read_text
from opcd.tasks.tools import Tool, names_of

RESERVED = {"conversation", "messages", "tokenize", "add_generation_prompt", "chat_template"}
REQUEST, ANSWER = "What is zebra 7?", "It is zebra 8."  # words that no template has
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # a tag of transformers' own
OTHER_DAY = date(2031, 3, 9)
# In front of a template: its clock stands still. Templates are given plain values only, so the day
# comes as a table, what each code of a date format stands for.
CLOCK = (
    "{% macro strftime_now(format) %}{% set now = namespace(text=format) %}"
    "{% for code, value in the_day %}{% set now.text = now.text.replace(code, value) %}"
    "{% endfor %}{{ now.text }}{% endmacro +%}"
)
# What templates raise: they index, add and divide as Python does.
_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
)
CODES = "aAbBcdDeFgGhHIjmMprRSTuUVwWxXyY"
# Codes that not every system has; a day has no time, and begins at midnight.
OTHER_CODES = {"%C": "20", "%f": "000000", "%k": " 0", "%l": "12", "%n": "\n", "%P": "am"}
OTHER_CODES |= {"%t": "\t", "%z": "", "%Z": ""}


class Frame(NamedTuple):
    """What a template writes around an answer."""

    opening: str  # between a request and its completion: the generation prompt
    before: str | None  # behind that, in front of the answer; None where no answer continues it
    after: str  # between the answer and what ends the turn
    end: int | None  # the special token that ends the turn; None where text alone does


class Template:
    """Renders messages with the tokenizer's chat template and fixed arguments, on a fixed day.

    Raises InputError for a tokenizer without a template, for an argument that is not the
    template's to take, and for a template that fails on a single request.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        arguments: Mapping[str, Any] | None = None,
        day: date | None = None,  # what templates that write a date take for today
    ) -> None:
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path
        self.day = day or date.today()
        self._arguments = dict(arguments or {})
        if taken := sorted(RESERVED & set(self._arguments)):
            raise InputError(
                f"chat_template_args must name arguments of the template's own, got "
                f"{', '.join(taken)}; leave that out"
            )
        if not tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {self.name!r} must have a chat template, got none; use an "
                f"instruct model, or name a file with one as chat_template"
            )
        if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
            raise InputError(
                f"the tokenizer of {self.name!r} must have a chat template named default, got "
                f"{', '.join(sorted(tokenizer.chat_template))}; write the one that is meant into a "
                f"file and name that as chat_template"
            )
        self._template = _with_clock(tokenizer.get_chat_template())
        # Of several templates one may be for prompts with tools.
        self._tools_template = _with_clock(tokenizer.get_chat_template(tools=[]))
        self.text([user(REQUEST)])

    def ids(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> list[int]:
        """Token ids of the messages, and of the tools, up to where the answer starts."""
        return self.encode(self.text(messages, tools=tools))

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, which holds its special tokens already."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def continued(self, opened: str, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that stand behind rendered text, each behind the one before it; a
        text's own where its first tokens merge with what is in front."""
        found, before = [], self.encode(opened)
        for text in texts:
            opened += text
            whole = self.encode(opened)
            own = whole[: len(before)] == before
            found.append(whole[len(before) :] if own else self.encode(text))
            before = whole
        return found

    def text(
        self,
        messages: Sequence[Message],
        answered: bool = False,
        day: date | None = None,
        tools: Sequence[Tool] = (),
    ) -> str:
        """The messages as text: opened for an answer, or with the last one as the answer."""
        if tools and "tools" in self._arguments:
            raise InputError(
                "tools must stand in one place, got some in the context and in chat_template_args; "
                "remove one"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=not answered,
                chat_template=self._tools_template if tools else self._template,
                **{"the_day": _table(day or self.day)} | self._arguments,
                **({"tools": list(tools)} if tools else {}),
            )
        except _FAILURES as error:
            given = ", ".join(m["role"] for m in messages[:4]) + (", ..." if messages[4:] else "")
            given += f"; tools {', '.join(names_of(tools))}" if tools else ""
            raise InputError(
                f"the chat template of {self.name!r} must accept these messages ({given}), but "
                f"says: {' '.join(str(error).split())[:200]}; name a file with another "
                f"template as chat_template"
            ) from error
        assert isinstance(text, str)
        return text

    def dated(self, messages: Sequence[Message], tools: Sequence[Tool] = ()) -> bool:
        """Whether the text is another one on another day."""
        return self.text(messages, tools=tools) != self.text(messages, day=OTHER_DAY, tools=tools)

    def opened(self, messages: Sequence[Message]) -> str:
        """What is written behind messages where an answer shall follow: the generation prompt."""
        text, closed = self.text(messages), self.text(messages, answered=True)
        return text[same_start(text, closed) :]

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message reaches the text."""
        try:
            return ANSWER in self.text([system(ANSWER), user(REQUEST)])
        except InputError:
            return False

    @cached_property
    def frame(self) -> Frame:
        """What stands around an answer, by what is written for one request with and without."""
        opening = self.text([user(REQUEST)]).partition(REQUEST)[2]
        if self._around is None:
            return Frame(opening, None, "", None)
        front, behind = self._around
        written = front.partition(REQUEST)[2] if REQUEST in front else None
        closing = behind.lstrip()
        ids = self.encode(closing)
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        end = ids[0] if ids and ids[0] in special else None
        after = "" if end is None else behind.removesuffix(closing)
        return Frame(opening, _before(opening, written), after, end)

    def written(self, answer: str) -> str | None:
        """What an answered turn has in the answer's place: many templates trim it. None where it
        does not stand between the same as others, like a thought that is left out."""
        if self._around is None:
            return None
        front, behind = self._around
        text = self.text([user(REQUEST), assistant(answer)], answered=True)
        if not (text.startswith(front) and text.endswith(behind)):
            return None
        return text[len(front) : len(text) - len(behind)]

    @cached_property
    def _around(self) -> tuple[str, str] | None:
        """All that is written in front of an answer and behind it; None where none is written."""
        try:
            text = self.text([user(REQUEST), assistant(ANSWER)], answered=True)
        except InputError:  # some templates take no answer at the end
            return None
        front, found, behind = text.rpartition(ANSWER)
        return (front, behind) if found else None

    @property
    def stop_ids(self) -> list[int]:
        """The tokens that end a completion beside the model's own: the tokenizer's EOS, and last
        what the template writes behind an answer."""
        found = (self.tokenizer.eos_token_id, self.frame.end)
        return list(dict.fromkeys(token for token in found if token is not None))


def same_start(one: str, other: str) -> int:
    """How many characters two texts have in common at their start."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def read_template(path: str) -> str:
    """A chat template from a file: Jinja, or JSON with the Jinja as its "chat_template".

    Raises InputError if there is none, or no Jinja in it.
    """
    text = _template_in(read_text(path, "chat_template"), path)
    try:
        jinja2.Environment(extensions=[loopcontrols]).parse(GENERATION.sub("", text))
    except jinja2.TemplateError as error:
        raise InputError(f"chat_template must be a Jinja file, got {path!r}: {error}") from error
    if "messages" not in text:
        raise InputError(
            f"chat_template must be a Jinja template of `messages`, got {path!r} without that "
            f"word; name the model's chat_template.jinja or one like it"
        )
    return text


def with_defaults(template: str, arguments: Mapping[str, Any]) -> str:
    """A chat template that takes these arguments where it is given none, and writes what it wrote.

    The line's end belongs to the block, and is not written (transformers trims blocks).
    """
    lines = [
        f"{{%- set {name} = {name} if {name} is defined else {_literal(value)} %}}\n"
        for name, value in arguments.items()
    ]
    return "".join(lines) + template


def _literal(value: Any) -> str:
    """Jinja's, of a value from YAML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)}: {_literal(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return "none" if value is None else json.dumps(value)


def _with_clock(template: str) -> str:
    return CLOCK + template if "strftime_now" in template else template


def _template_in(text: str, path: str) -> str:
    """The text itself, or what a tokenizer's JSON file holds."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    found = value.get("chat_template") if isinstance(value, dict) else None
    if not isinstance(found, str):
        raise InputError(
            f'chat_template must be a Jinja file, or a JSON file with its text as "chat_template", '
            f"got {path!r}, JSON without; write the template that is meant into a file of its own"
        )
    return found


def _before(opening: str, written: str | None) -> str | None:
    """What an answered turn has behind the generation prompt, in front of the answer.

    Nothing where the prompt is longer than what an answered turn begins with by a thought, which
    some templates leave out of answered turns. None where both go different ways.
    """
    if written is None:
        return None
    if written.startswith(opening):
        return written.removeprefix(opening)
    thought = opening.startswith(written) and not split_thought(opening[len(written) :]).answer
    return "" if thought else None


def _table(day: date) -> list[tuple[str, str]]:
    """What each code of a date format stands for on that day; `%-d` is `%d` without zeros."""
    found = {f"%{code}": day.strftime(f"%{code}") for code in CODES} | OTHER_CODES
    bare = {f"%-{code[1:]}": str(int(x)) for code, x in found.items() if x.strip().isdigit()}
    seconds = (day - date(1970, 1, 1)).days * 86400
    percent = "\0"  # stands for %% while the codes are replaced
    whole = {**bare, **found, "%s": str(seconds)}
    return [("%%", percent), *whole.items(), (percent, "%")]
