"""What experience becomes: contexts within a number of tokens, each a file that people can read."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from opcd.experience.attempts import Attempt
from opcd.experience.successes import demonstrations, diverse
from opcd.runtime.files import write_json, write_text
from opcd.tasks.chat import APART, behind
from opcd.tasks.messages import Message, system, user
from opcd.tasks.prepare import Setup

T = TypeVar("T")
HEADER = "What earlier work on such problems has taught:"
ITEMS, SUCCESSES = "items", "successes"


class Candidate(NamedTuple):
    """A context that may be distilled."""

    name: str  # and of its file
    kind: str  # ITEMS or SUCCESSES
    messages: list[Message]
    size: int  # items, or demonstrations

    def write(self, folder: Path) -> Path:
        """As a context file: a text alone as .md."""
        if len(self.messages) == 1:
            path = folder / f"{self.name}.md"
            write_text(path, self.messages[0]["content"] + "\n")
        else:
            path = folder / f"{self.name}.json"
            write_json(path, self.messages)
        return path


def kind_of(file: Path) -> str:
    """The kind of a candidate, by its file."""
    return file.stem.rpartition("-")[0]


def newest_within(items: Sequence[T], most: int, tokens: Callable[[Sequence[T]], int]) -> list[T]:
    """The longest end of the items that takes at most so many tokens; each stays whole.

    One that is too long by itself is passed over.
    """
    kept: list[T] = []
    for item in reversed(items):
        if tokens([item]) > most:
            continue
        if tokens([item, *kept]) > most:
            break
        kept.insert(0, item)
    return kept


def items_candidates(
    items: Sequence[str], instruction: str, setup: Setup, count: int, most: int, seed: int
) -> list[Candidate]:
    """Contexts of items: candidate 0 has the newest, each other one the end of a shuffle."""

    def messages(chosen: Sequence[str]) -> list[Message]:
        texts = [instruction] if instruction else []
        return [system(APART.join([*texts, "\n".join([HEADER, *chosen])]))]

    def ordered(number: int) -> list[str]:
        if number == 0:
            return [*items]
        return random.Random(f"{seed} {number}").sample(items, len(items))

    return _candidates(ITEMS, ordered, messages, setup, count, most)


def success_candidates(
    found: Sequence[Attempt], instruction: str, setup: Setup, count: int, most: int, seed: int
) -> list[Candidate]:
    """Contexts of demonstrations, see `successes.diverse`."""

    def messages(chosen: Sequence[Attempt]) -> list[Message]:
        front = [system(instruction)] if instruction else []
        return [*front, *demonstrations(chosen)]

    def ordered(number: int) -> list[Attempt]:
        return diverse(found, number, seed)

    return _candidates(SUCCESSES, ordered, messages, setup, count, most)


def _candidates(
    kind: str,
    ordered: Callable[[int], Sequence[T]],
    messages: Callable[[Sequence[T]], list[Message]],
    setup: Setup,
    count: int,
    most: int,
) -> list[Candidate]:
    """Those that hold something and are not the same as one before."""

    def tokens(chosen: Sequence[T]) -> int:
        return context_tokens(messages(chosen), setup)

    found: list[Candidate] = []
    for number in range(count):
        chosen = newest_within(ordered(number), most, tokens)
        made = messages(chosen)
        if chosen and all(made != other.messages for other in found):
            found.append(Candidate(f"{kind}-{number + 1}", kind, made, len(chosen)))
    return found


def context_tokens(messages: Sequence[Message], setup: Setup) -> int:
    """What a context adds to a short request, in tokens."""
    template, asked = setup.chat.template, [user("?")]
    with_it = template.ids(behind(messages, asked, setup.chat.placement))
    return len(with_it) - len(template.ids(asked))
