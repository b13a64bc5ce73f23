"""Successes: right attempts as demonstrations, for models that succeed now and then."""

import random
from collections.abc import Sequence
from itertools import chain, zip_longest

from opcd.experience.attempts import Attempt
from opcd.scoring.reasoning import split_thought
from opcd.scoring.texts import bare, folded, normalised
from opcd.tasks.messages import Message, assistant, words_of


def successes(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Of each problem its shortest right attempt, without a thought; the shortest first.

    Problems that are the same in what they ask count as one.
    """
    best: dict[str, Attempt] = {}
    for attempt in attempts:
        answer = split_thought(attempt.text).answer
        if not (attempt.right and answer):
            continue
        key = "\n".join(normalised(words_of(message)) for message in attempt.problem)
        known = best.get(key)
        if known is None or len(answer) < len(known.text):
            best[key] = Attempt(attempt.problem, answer, attempt.value)
    return sorted(best.values(), key=_length)


def diverse(found: Sequence[Attempt], number: int, seed: int) -> list[Attempt]:
    """Successes in an order for candidate `number`, the ones that are wanted most at its end.

    Their answers take turns, so that an answer that comes easily does not crowd out the others.
    Candidate 0 has the shortest of all; each other one is made of a random half.
    """
    if number:
        chosen = set(
            random.Random(f"{seed} {number}").sample(range(len(found)), -(-len(found) // 2))
        )
        found = [attempt for i, attempt in enumerate(found) if i in chosen]
    by_answer: dict[str, list[Attempt]] = {}
    for attempt in found:
        by_answer.setdefault(folded(bare(attempt.text)), []).append(attempt)
    turns = chain.from_iterable(zip_longest(*by_answer.values()))
    return [attempt for attempt in turns if attempt is not None][::-1]


def demonstrations(chosen: Sequence[Attempt]) -> list[Message]:
    """Problems and their answers, as turns of a conversation."""
    return [turn for a in chosen for turn in (*a.problem, assistant(a.text))]


def _length(attempt: Attempt) -> int:
    return len(attempt.text) + sum(len(words_of(message)) for message in attempt.problem)
