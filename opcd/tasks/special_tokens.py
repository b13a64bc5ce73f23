"""Special tokens that are spelled in a text: they become real ones, for both models."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from opcd.tasks.data import Contexts, Example
from opcd.tasks.messages import words_of


def special_tokens_in(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """The special tokens that texts spell, each with the places of those texts in the list."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {*tokenizer.all_special_tokens}
    found = {
        token: [i for i, text in enumerate(texts) if token in text] for token in sorted(special)
    }
    return {token: places for token, places in found.items() if places}


def placed_texts(
    parts: Mapping[str, Sequence[Example]], contexts: Contexts
) -> list[tuple[str, str]]:
    """Where each text of the data stands, and the text; calls and schemas of tools as JSON."""
    placed = []
    for name, context in contexts.items():
        place = f"context {name!r}" if name else "the context"
        placed += [(place, words_of(message)) for message in context.messages]
        placed += [
            (f"the tools of {place}", json.dumps(t, ensure_ascii=False)) for t in context.tools
        ]
    said = {  # once each: prompts of one conversation share their messages
        id(message): (Path(example.source).name, words_of(message))
        for examples in parts.values()
        for example in examples
        for message in example.conversation
    }
    return [*placed, *said.values()]


def special_token_remarks(
    placed: Sequence[tuple[str, str]],  # where each text stands, and the text
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """A line for each special token that texts spell: how often, and where first."""
    found = special_tokens_in([text for _, text in placed], tokenizer)
    return [
        f"{token} is spelled in {len(places)} text{'s' if len(places) > 1 else ''}, first in "
        f"{placed[places[0]][0]}: the models read a special token there, not its letters"
        for token, places in found.items()
    ]
