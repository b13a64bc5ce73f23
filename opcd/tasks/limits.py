"""What must fit the model: lengths, and tokens that it has embeddings for."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.tasks.data import Example


def check_lengths(
    examples: Sequence[Example],
    lengths: Sequence[int],  # tokens of each example, rendered with the context
    max_completion_tokens: int,
    max_positions: int | None,
    context_tokens: int,
) -> None:
    """Raise InputError if context, prompt and completion exceed the model's positions."""
    if max_positions is None or not lengths:
        return
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    total = lengths[longest] + max_completion_tokens
    if total > max_positions:
        raise InputError(
            f"context, prompt and completion must fit the model's {max_positions} positions, got "
            f"{context_tokens} + {lengths[longest] - context_tokens} + {max_completion_tokens} = "
            f"{total} tokens for {examples[longest].source}; shorten the context or that prompt, "
            f"or lower max_completion_tokens (nothing is cut silently)"
        )


def check_conversation(
    example: Example,
    length: int,  # tokens of its conversation, rendered with the context
    max_positions: int | None,
) -> None:
    """Raise InputError if context and conversation exceed the model's positions."""
    if max_positions is not None and length > max_positions:
        raise InputError(
            f"{example.source}: context and recorded conversation must fit the model's "
            f"{max_positions} positions, got {length} tokens; shorten the context or that "
            f"conversation (nothing is cut silently)"
        )


def check_tokens(
    ids: Sequence[int], vocab_size: int, tokenizer: PreTrainedTokenizerBase, example: Example
) -> None:
    """Raise InputError for a token that the model has no embedding for."""
    if (largest := max(ids)) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(largest)
        raise InputError(
            f"{example.source}: the model must have an embedding for every token of the prompt and "
            f"its context, got token {largest} ({token!r}) and {vocab_size} embeddings; resize the "
            f"embeddings and train the new ones, or use the model's own tokenizer"
        )
