"""Requests that have nothing to do with a context: 300 that come with opcd, or a user's own."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.data import (
    NO_CONTEXT,
    Contexts,
    Example,
    also_in,
    check_contexts,
    row_remarks,
    strip_context,
)
from opcd.tasks.formats import read_row
from opcd.tasks.limits import check_tokens
from opcd.tasks.records import read_records
from opcd.tasks.special_tokens import placed_texts, special_token_remarks
from opcd.tasks.task import TaskFiles, rendered, spread

BUILT_IN = Path(__file__).with_suffix(".jsonl")  # 15 kinds, 20 of each
ANSWER_TOKENS = 16  # of an answer, at most: enough to tell two models apart, and soon made


class Request(NamedTuple):
    """One of them, as a model without the context sees it."""

    example: Example
    kind: str  # what it is counted under as well; "" for nothing
    token_ids: list[int]


def read_elsewhere(
    config: TrainConfig,
    files: TaskFiles,
    chat: Chat,
    max_positions: int | None,
    vocab_size: int,  # of the model: its embeddings
) -> tuple[list[Request], list[str]]:
    """At most `elsewhere_prompts` of the requests, spread over their file, and remarks on it.

    Rows have any form of prompts, and may say their "kind", a text. What stands in the task's own
    data as well is said, and stays.

    Raises InputError for a file of another form, and for a request that does not fit the model.
    """
    if not config.elsewhere_prompts:
        return [], []
    path = config.elsewhere_data or str(BUILT_IN)
    rows, remarks = read_requests(path, "elsewhere_data", files.contexts)
    rows = spread(rows, config.elsewhere_prompts)
    requests = [Request(e, kind, rendered(chat.student_ids, e)) for e, kind in rows]
    for request in requests:
        check_tokens(request.token_ids, vocab_size, chat.template.tokenizer, request.example)
        length = len(request.token_ids)
        if max_positions is not None and length + ANSWER_TOKENS > max_positions:
            raise InputError(
                f"{request.example.source}: a request elsewhere and {ANSWER_TOKENS} tokens of its "
                f"answer must fit the model's {max_positions} positions, got {length} tokens; "
                f"shorten it, or set elsewhere_prompts to 0 to leave all of them out"
            )
    examples = [request.example for request in requests]
    if common := also_in(examples, files.parts):
        remarks.append(
            f"{Path(path).name}: {len(common)} of {len(examples)} requests elsewhere stand in the "
            f"task's own data as well, first {common[0].source}; each of them counts"
        )
    placed = placed_texts({"elsewhere": examples}, {})
    return requests, [*remarks, *special_token_remarks(placed, chat.template.tokenizer)]


def read_requests(
    path: str, field: str, contexts: Contexts
) -> tuple[list[tuple[Example, str]], list[str]]:
    """The requests of a file with their kinds, and remarks on how it was read."""
    rows: list[tuple[Example, str]] = []
    forms, notes, unused = Counter[str](), Counter[str](), set[str]()
    for source, record in read_records(path, field):
        kind = record.pop("kind", None) or ""
        if not isinstance(kind, str):
            raise InputError(
                f'{source}: "kind" must be a text that requests are counted under, got '
                f"{kind!r:.80}; write one, or leave it out"
            )
        row = read_row(record, source, ())
        messages, found = strip_context(row, contexts.get(row.context, NO_CONTEXT), source)
        rows.append((Example(tuple(messages), (), source, row.context), kind))
        left_out = [f"{row.origin} left out"] if row.origin else []
        notes.update([*row.notes, *found, *left_out, *row.answer_notes])
        forms[row.form] += 1
        unused.update(row.unused)
    check_contexts({"elsewhere": [e for e, _ in rows if e.context]}, contexts)
    return rows, row_remarks(path, forms, notes, unused)
