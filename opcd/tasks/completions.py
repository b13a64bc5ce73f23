"""Completions of training prompts from a file: another model's, or another run's."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from opcd.config import TrainConfig
from opcd.errors import InputError
from opcd.tasks.chat import Chat
from opcd.tasks.data import Example, strip_context
from opcd.tasks.formats import read_row
from opcd.tasks.messages import Message
from opcd.tasks.records import read_records
from opcd.tasks.task import Task


def read_completions(
    config: TrainConfig,
    task: Task,
    examples: Sequence[Example],  # of the training prompts, in their order
    chats: Mapping[str, Chat],  # by the name of the context
) -> tuple[dict[int, list[list[int]]], list[str]]:
    """The token ids of each training prompt's completions, by the prompt's key; and remarks.

    A line is a row in any form of `formats`, ``{"prompt": ..., "completion": text}`` or messages
    of which the assistant's is the last, with the name of its context where there are several, or
    with ``"completion_token_ids"`` in place of the text, which is tokenized behind its prompt and
    ended as the chat template ends an answer. A guided.jsonl of another run is taken as it is.

    Raises InputError for lines of another form, token ids that are not the tokenizer's, a file made
    for another context, and training prompts that it has no completion for.
    """
    path, limit = str(config.guided_completions), config.max_completion_tokens
    records = read_records(path, "guided_completions")
    tokenizer = next(iter(chats.values())).template.tokenizer
    by_words = {
        (_words(example.messages), example.context): prompt.key
        for example, prompt in zip(examples, task.train, strict=True)
    }
    by_key = {prompt.key: e for e, prompt in zip(examples, task.train, strict=True)}
    found: dict[int, list[list[int]]] = {}
    unused: list[str] = []
    for source, record in records:
        if "rule" in record:
            _check_contexts(record, task, source)
            continue
        key, text = record.get("key"), record.get("completion")
        if key is None:
            row = read_row(record, source)
            context = chats[row.context].context if row.context in chats else []
            messages, _ = strip_context(row.messages, context, source)
            key, text = by_words.get((_words(messages), row.context)), row.completion
        elif not isinstance(key, int):
            raise InputError(f'{source}: "key" must be a number, got {key!r}; leave it out')
        ids = record.get("completion_token_ids")
        if ids is not None:
            _check_ids(ids, source, tokenizer)
        elif not isinstance(text, str) or not text.strip():
            raise InputError(
                f'{source}: each line must have a "completion" (text) or "completion_token_ids", '
                f"got keys {sorted(record)}"
            )
        if key is None or key not in by_key:
            unused.append(source)
            continue
        if ids is None:
            example = by_key[key]
            ids = chats[example.context].completion_ids(example.messages, str(text))
        if len(ids) > limit:
            raise InputError(
                f"{source}: a completion must have at most max_completion_tokens "
                f"{limit} tokens, got {len(ids)}; raise it, or shorten the text"
            )
        found.setdefault(key, []).append(ids)
    for example, prompt in zip(examples, task.train, strict=True):
        if prompt.key not in found:
            raise InputError(
                f"guided_completions must have a completion for every training prompt, but "
                f"{path!r} has none for {example.source} ({example.text!r}); add it, or leave the "
                f"prompt out of the training prompts"
            )
    remarks = []
    if unused:
        rows = f"{len(unused)} row{'s' if len(unused) > 1 else ''}"
        remarks.append(
            f"{Path(path).name}: {rows} of completions left out, of no training prompt, first "
            f"{unused[0]}"
        )
    return found, remarks


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
