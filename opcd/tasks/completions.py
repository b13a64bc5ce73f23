"""Completions of training prompts from a file: another model's, or another run's."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.contexts import Context
from opcd.tasks.data import NO_CONTEXT, Example, row_remarks, strip_context
from opcd.tasks.formats import REQUESTS, Row, read_row
from opcd.tasks.messages import Message, assistant, calls_of, words_of
from opcd.tasks.records import Record, read_records
from opcd.tasks.special_tokens import special_token_remarks
from opcd.tasks.task import Task


class Completions(NamedTuple):
    """Completions of training prompts, and what people should know of them."""

    by_key: dict[int, list[list[int]]]  # token ids, by the prompt's key
    remarks: list[str]


def read_completions(
    config: TrainConfig,
    task: Task,
    examples: Sequence[Example],  # of the training prompts, in their order
    chats: Mapping[str, Chat],  # by the name of the context
    stop_ids: Sequence[int],  # the tokens that end a completion
) -> Completions:
    """The completions of each training prompt.

    A line is a row in any form of `formats`, ``{"prompt": ..., "completion": text}`` or messages
    of which the assistant's is the last, with the name of its context where there are several, or
    with ``"completion_token_ids"`` in place of the text. A text stands as the chat template writes
    an answer, and is ended as it ends one; token ids are taken as they are, with the end that they
    have or have not. Calls of tools stand as the chat template writes a turn with them. A
    guided.jsonl of another run is taken as it is.

    Raises InputError for lines of another form, token ids that are not the tokenizer's, a
    completion that goes on behind its end, a file made for another context, and training prompts
    that it has no completion for.
    """
    path = str(config.guided_completions)
    tokenizer = next(iter(chats.values())).template.tokenizer
    by_key = {prompt.key: e for e, prompt in zip(examples, task.train, strict=True)}
    keys = {(_words(e.messages), e.context): key for key, e in by_key.items()}
    found: dict[int, list[list[int]]] = {}
    texts: list[tuple[str, str]] = []
    unused: list[str] = []
    endless: list[str] = []
    key: int | None
    forms, notes, columns = Counter[str](), Counter[str](), set[str]()
    for source, record in read_records(path, "guided_completions"):
        if _from_a_run(record) and "rule" in record:
            _check_contexts(record, task, source)
            continue
        ids = record.get("completion_token_ids")
        if ids is not None:
            _check_ids(ids, source, tokenizer)
        if _from_a_run(record):
            key, answer = _key_of(record, source), assistant(str(record.get("completion", "")))
        else:
            row = read_row(record, source, {"completion"})
            messages, found_there = _without_context(row, chats, source)
            key = keys.get((_words(messages), row.context))
            answer = assistant(row.completion, row.calls)
            _check_one(ids, row, stop_ids, source)
            notes.update([*row.notes, *found_there])
            forms[row.form] += 1
            columns |= {*row.unused} - {"completion_token_ids"}
        if ids is None and not words_of(answer).strip():
            raise InputError(
                f'{source}: each line must have a "completion" (text) or "completion_token_ids", '
                f"got keys {sorted(record)}"
            )
        if key is None or key not in by_key:
            unused.append(source)
            continue
        if ids is None:
            texts.append((Path(source).name, words_of(answer)))
            ids = _tokenized(answer, by_key[key], chats, stop_ids, source)
        elif ids[-1] not in stop_ids:
            endless.append(source)
        _check_whole(ids, stop_ids, config.max_completion_tokens, source, tokenizer)
        _check_stops(ids, config.stop, chats[by_key[key].context], source)
        found.setdefault(key, []).append(ids)
    for key, example in by_key.items():
        if key not in found:
            raise InputError(
                f"guided_completions must have a completion for every training prompt, but "
                f"{path!r} has none for {example.source} ({example.text!r}); add it, or leave the "
                f"prompt out of the training prompts"
            )
    remarks = [
        *(row_remarks(path, forms, notes, columns) if forms else []),
        *_counted(path, unused, "left out, of no training prompt"),
        *_counted(path, endless, "as token ids without an end, which none is added to"),
        *special_token_remarks(texts, tokenizer),
    ]
    return Completions(found, remarks)


def _from_a_run(record: Record) -> bool:
    """Whether it is a line of a run's guided.jsonl, which names a prompt by its key alone."""
    return not set(REQUESTS) & set(record) and bool({"key", "rule"} & set(record))


def _key_of(record: Record, source: str) -> int:
    """The key of the training prompt that a line of a run's guided.jsonl completes."""
    if type(key := record.get("key")) is not int:
        raise InputError(
            f'{source}: "key" must be a number of a run\'s guided.jsonl, got {key!r:.80}; write '
            f'the request as "prompt" in its place'
        )
    return key


def _without_context(
    row: Row, chats: Mapping[str, Chat], source: str
) -> tuple[list[Message], list[str]]:
    chat = chats.get(row.context)
    return strip_context(row, Context(chat.context, chat.tools) if chat else NO_CONTEXT, source)


def _check_one(ids: Any, row: Row, stop_ids: Sequence[int], source: str) -> None:
    """Raise InputError for a row of two completions, or of an end alone."""
    if ids is not None and (row.completion.strip() or row.calls):
        raise InputError(
            f"{source}: a row must have one completion, got {row.origin} and "
            f'"completion_token_ids"; remove the one that is not meant'
        )
    if ids is not None and all(i in stop_ids for i in ids):
        raise InputError(
            f"{source}: a completion must hold an answer, got what ends it alone; write one"
        )


def _tokenized(
    answer: Message,
    example: Example,
    chats: Mapping[str, Chat],
    stop_ids: Sequence[int],
    source: str,
) -> list[int]:
    chat = chats[example.context]
    try:
        if calls_of(answer):
            return chat.call_ids(example.messages, answer, stop_ids)
        return chat.completion_ids(example.messages, answer["content"])
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _check_whole(
    ids: Sequence[int],
    stop_ids: Sequence[int],
    limit: int,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise InputError for a completion that is too long, or that goes on behind its end."""
    if stops := [i for i in ids[:-1] if i in stop_ids]:
        raise InputError(
            f"{source}: a completion must end with what ends it, got text behind "
            f"{tokenizer.convert_ids_to_tokens(stops[0])}; remove that token, or what follows it"
        )
    if len(ids) > limit:
        raise InputError(
            f"{source}: a completion must have at most max_completion_tokens "
            f"{limit} tokens, got {len(ids)}; raise it, or shorten the text"
        )


def _check_stops(ids: Sequence[int], strings: Sequence[str], chat: Chat, source: str) -> None:
    """Raise InputError for a completion that goes on where the student's would have ended."""
    text = chat.plain_text(ids[:-1]) if strings else ""
    if found := [string for string in strings if string in text]:
        raise InputError(
            f"{source}: a completion must end where a stop string is complete, got more behind "
            f"{found[0]!r}, be it the end of the turn; pass completion_token_ids up to there, or "
            f"leave it out of stop"
        )


def _counted(path: str, sources: Sequence[str], what: str) -> list[str]:
    if not sources:
        return []
    rows = f"{len(sources)} row{'s' if len(sources) > 1 else ''}"
    return [f"{Path(path).name}: {rows} of completions {what}, first {sources[0]}"]


def _words(messages: Sequence[Message]) -> str:
    return json.dumps(list(messages), sort_keys=True)


def _check_contexts(rule: dict[str, Any], task: Task, source: str) -> None:
    theirs = rule.get("contexts", {})
    for name, digest in task.context_digests.items():
        if theirs.get(name) != digest:
            what = f"context {name!r}" if name else "the context"
            raise InputError(
                f"{source}: the completions must have been made for {what} of this run, but were "
                f"made for another one; make them anew, or restore the context"
            )


def _check_ids(ids: Any, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = isinstance(ids, list) and all(type(i) is int for i in ids)
    if not whole or not ids or not 0 <= min(ids) <= max(ids) < len(tokenizer):
        raise InputError(
            f"{source}: completion_token_ids must be token ids of this tokenizer, from 0 to "
            f"{len(tokenizer) - 1}, got {str(ids)[:80]}; make them with the model's own tokenizer"
        )
