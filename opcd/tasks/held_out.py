"""Prompts that a run keeps out of training, to be measured on, where no other data is named."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple

from opcd.errors import InputError
from opcd.runtime.files import shown
from opcd.tasks.data import Example, asked_of
from opcd.tasks.formats import ANSWERS, accepted_answers
from opcd.tasks.records import read_records

FEWEST = 40  # prompts: of fewer none are kept out
MOST_VALIDATION, MOST_TEST = 64, 256


class Parts(NamedTuple):
    """Prompts, each request in one part alone."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]


def hold_out(prompts: Sequence[Example], share: float, inside: Iterable[Example] = ()) -> Parts:
    """A third of the share for validation and the rest for the test, each in the file's order.

    Which ones is a function of their texts: a prompt that is added moves few others. At least one
    is left to train on, and so are requests that stand `inside` of conversations, where those are
    trained on from their first turn.
    """
    by_request: dict[str, list[Example]] = {}
    for example in prompts:
        by_request.setdefault(_digest(example), []).append(example)
    if len(by_request) < FEWEST:
        return Parts([*prompts], [], [])
    order = sorted(set(by_request) - {_digest(example) for example in inside})
    kept_out = min(int(share * len(by_request)), len(by_request) - 1, len(order))
    validation = min(kept_out // 3, MOST_VALIDATION)
    test = min(kept_out - kept_out // 3, MOST_TEST)
    part_of = {
        id(example): 1 if number < validation else 2 if number < validation + test else 0
        for number, request in enumerate(order)
        for example in by_request[request]
    }
    parts: list[list[Example]] = [[], [], []]
    for example in prompts:
        parts[part_of.get(id(example), 0)].append(example)
    return Parts(*parts)


def _digest(example: Example) -> str:
    """Of a request behind whatever context, which the student does not see, and behind whatever
    system message of its own: what is asked on another day is no other request."""
    return hashlib.sha256(repr(("", asked_of(example))).encode()).hexdigest()


def with_their_answers(parts: Parts, path: str) -> tuple[Parts, list[str]]:
    """What is kept out, with the answers that every row of the file has beside its request; and
    what people should know of it.

    As it is where a row has none, or one that cannot be read: prompts to train on need no answers.
    A completion is no answer here: what a log's model once said is not what counts as right.
    """
    records = {
        source: {key: value for key, value in record.items() if value is not None}
        for source, record in read_records(path, "prompts")
    }
    if not all(set(ANSWERS) & set(record) for record in records.values()):
        return parts, []

    def labelled(examples: Sequence[Example]) -> list[Example]:
        found = [accepted_answers(records[e.source], e.source)[0] for e in examples]
        return [replace(e, answers=a) for e, a in zip(examples, found, strict=True)]

    try:
        found = Parts(parts.train, labelled(parts.validation), labelled(parts.test))
    except InputError as error:
        remark = f"what stands beside the requests of {shown(path)} is not taken for answers"
        return parts, [f"{remark}: {error}"]
    return found, []
