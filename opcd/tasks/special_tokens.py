"""Special tokens that are spelled in a text: they become real ones, for both models."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from opcd.tasks.data import Contexts, Example


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


def special_token_remarks(
    parts: Mapping[str, Sequence[Example]], contexts: Contexts, tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """A line for each special token that the data spell: how often, and where first."""
    spelled = [
        (f"context {name!r}" if name else "the context", message["content"])
        for name, context in contexts.items()
        for message in context
    ]
    spelled += [
        (f"{Path(example.source).name}", message["content"])
        for examples in parts.values()
        for example in examples
        for message in example.messages
    ]
    found = special_tokens_in([text for _, text in spelled], tokenizer)
    return [
        f"{token} is spelled in {len(places)} text{'s' if len(places) > 1 else ''}, first in "
        f"{spelled[places[0]][0]}: the models read a special token there, not its letters"
        for token, places in found.items()
    ]
