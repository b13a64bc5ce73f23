"""What some prompts of a call share behind the start of all: a history that is computed once.

The turns of one conversation are asked behind one history, each behind more of it than the turn
before: the prompt of the last one holds, but for what opens an answer, all others.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from opcd.passes.prefix import MIN_TOKENS_SAVED

Tokens = Sequence[int]


class Branch(NamedTuple):
    """A sequence as the first tokens of another, its trunk, and a rest of its own."""

    trunk: int  # number of the other; its own where it is a trunk itself
    length: int  # how many tokens both begin with


def branches(sequences: Sequence[Tokens], start: int) -> list[Branch]:
    """Of each sequence, the longer one in whose pass most of it is computed; the first `start`
    tokens, which all have in common, count for nobody.

    A rest of its own takes a second pass: where those save too little, each such sequence is a
    trunk. Equal sequences have one.
    """
    found = [Branch(i, len(sequence)) for i, sequence in enumerate(sequences)]
    for related in _related(sequences, start):
        trunks: list[int] = []
        for i in sorted(related, key=lambda i: (-len(sequences[i]), i)):
            own = sequences[i]
            in_common = [(common_start(own, sequences[t], start), -t) for t in trunks]
            length, other = max(in_common, default=(0, 0))
            if trunks and _mostly(length, own, start):
                found[i] = Branch(-other, length)
            else:
                trunks.append(i)
    rests = [i for i, branch in enumerate(found) if branch.length < len(sequences[i])]
    if sum(found[i].length - start for i in rests) < MIN_TOKENS_SAVED:
        first: dict[tuple[int, ...], int] = {}
        for i in rests:
            found[i] = Branch(first.setdefault(tuple(sequences[i]), i), len(sequences[i]))
    return found


def tokens_saved(found: Sequence[Branch], start: int) -> int:
    """How many tokens are in a trunk's pass that would else be in another one, too."""
    return sum(branch.length - start for i, branch in enumerate(found) if branch.trunk != i)


def batches_by_history(sequences: Sequence[Tokens], start: int, size: int) -> Iterator[list[int]]:
    """Indices in batches of at most `size`: what shares a history together, the longest first.

    Where nothing is shared, neighbours in length are together.
    """
    groups = [related[i : i + size] for related in _related(sequences, start)
              for i in range(0, len(related), size)]  # fmt: skip
    groups.sort(key=lambda group: (-max(len(sequences[i]) for i in group), min(group)))
    batch: list[int] = []
    for group in groups:
        if len(batch) + len(group) > size:
            yield batch
            batch = []
        batch = [*batch, *group]
    if batch:
        yield batch


def common_start(one: Tokens, other: Tokens, known: int = 0) -> int:
    """How many tokens two sequences begin with alike, of which `known` are known to be."""
    most = min(len(one), len(other))
    return next((i for i in range(known, most) if one[i] != other[i]), most)


def _related(sequences: Sequence[Tokens], start: int) -> list[list[int]]:
    """Numbers of those that share most of what they hold, each with the next one in the order of
    their tokens, where neighbours have most in common."""
    order = sorted(range(len(sequences)), key=lambda i: (list(sequences[i]), i))
    found: list[list[int]] = []
    for place, i in enumerate(order):
        before = order[place - 1] if place else i
        shorter = min(sequences[before], sequences[i], key=len)
        length = common_start(sequences[before], sequences[i], start)
        if place and _mostly(length, shorter, start):
            found[-1].append(i)
        else:
            found.append([i])
    return found


def _mostly(length: int, sequence: Tokens, start: int) -> bool:
    """Whether so many tokens are at least half of what a sequence holds behind `start`."""
    return 2 * (length - start) >= len(sequence) - start
