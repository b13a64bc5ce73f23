"""Successes: right attempts as demonstrations, for models that succeed now and then."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, zip_longest

from opcd.experience.attempts import Attempt
from opcd.scoring.reasoning import split_thought
from opcd.scoring.texts import bare, folded, normalised
from opcd.tasks.kept import without_thoughts
from opcd.tasks.messages import Message, words_of


def successes(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Of each problem its shortest right attempt, without a thought; the shortest first.

    Problems that are the same in what they ask count as one.
    """
    best: dict[str, Attempt] = {}
    for attempt in attempts:
        turns = without_thoughts(attempt.turns)
        if not (attempt.right and all(split_thought(text).answer for text in attempt.said)):
            continue
        key = "\n".join(normalised(words_of(message)) for message in attempt.problem)
        known = best.get(key)
        shorter = replace(attempt, turns=turns)
        if known is None or _spoken(shorter) < _spoken(known):
            best[key] = shorter
    return sorted(best.values(), key=_length)


def diverse(found: Sequence[Attempt], number: int, seed: int) -> list[Attempt]:
    """Successes in an order for candidate `number`, the ones that are wanted most at its end.

    Answers take turns, the shortest success first. In candidates of even number each answer comes
    as often as the rarest, so that one that comes easily does not outweigh the others; those of odd
    number have all. The first of either kind chooses from all successes, others from a random half.
    """
    if number > 1:
        half = random.Random(f"{seed} {number}").sample(range(len(found)), -(-len(found) // 2))
        found = [found[i] for i in sorted(half)]
    by_answer: dict[str, list[Attempt]] = {}
    for attempt in found:
        by_answer.setdefault(folded(bare(attempt.accepted or attempt.text)), []).append(attempt)
    rarest = min(map(len, by_answer.values()), default=0)
    groups = [group if number % 2 else group[:rarest] for group in by_answer.values()]
    turns = chain.from_iterable(zip_longest(*groups))
    return [attempt for attempt in turns if attempt is not None][::-1]


def demonstrations(chosen: Sequence[Attempt]) -> list[Message]:
    """Problems and their answers, as turns of a conversation, which the last answer ends."""
    return [turn for a in chosen for turn in (*a.problem, *_up_to_answer(a.turns))]


def _up_to_answer(turns: Sequence[Message]) -> list[Message]:
    """Without what a game's environment says last, which nothing is answered to."""
    return list(turns[:-1] if turns[-1]["role"] == "user" else turns)


def _spoken(attempt: Attempt) -> int:
    return sum(len(words_of(turn)) for turn in attempt.turns)


def _length(attempt: Attempt) -> int:
    return _spoken(attempt) + sum(len(words_of(message)) for message in attempt.problem)
