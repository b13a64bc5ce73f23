"""A context with its least telling tokens left out, by the package llmlingua (the extra `rivals`).

As LLMLingua has it, instructions stay as they are where demonstrations stand behind them; what goes
are whole demonstrations, and tokens of the requests in the others. Their answers stay: labels and
formats are what a small model would rate as noise. They are demonstrations again afterwards, turns
of a conversation: as one text SmolLM2-135M made nothing of them. A context that is instructions
alone is compressed itself.

The rate that is asked for is not what is reached, so rates are searched: what counts is how many
tokens a request then carries in front.
"""

import importlib.util
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from opcd.errors import InputError
from opcd.tasks.messages import Message, assistant, split_system, system, user
from opcd.tasks.prepare import Setup

PACKAGE = "llmlingua"
RATES = 6  # that are tried: each halves the range
PASS = 200  # tokens that LLMLingua ranks at once
Compress = Callable[[float], list[Message]]  # a context at a rate; [] where nothing is left


class Compressed(NamedTuple):
    """A shorter context, and what it takes."""

    messages: list[Message]
    tokens: float  # in front of a request
    rate: float  # that was asked for


class Shown(NamedTuple):
    """A demonstration."""

    request: str
    answer: str


def is_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec(PACKAGE) is not None


def lacking(context: Sequence[Message]) -> str | None:
    """What a context would need to be compressed; None where nothing is lacking."""
    if not is_installed():
        return (
            f"the package {PACKAGE}, which is not installed; pip install 'opcd-kernels[rivals]', "
            f"or leave it out"
        )
    roles = [turn["role"] for turn in split_system(context)[1]]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        return (
            f"a context whose turns are pairs of a user's and an assistant's, got "
            f"{', '.join(roles)}; leave it out"
        )
    return None


def compress_to(
    most: float,  # tokens
    compress: Compress,
    tokens_of: Callable[[Sequence[Message]], float],  # in front of a request
) -> Compressed:
    """The longest context of at most so many tokens that some rate gives; else the shortest found.

    Raises InputError where no rate leaves anything.
    """
    found: list[Compressed] = []
    low, high = 0.0, 1.0
    for _ in range(RATES):
        rate = (low + high) / 2
        messages = compress(rate)
        tokens = tokens_of(messages) if messages else 0.0
        found.append(Compressed(messages, tokens, rate))
        low, high = (rate, high) if tokens <= most else (low, rate)
    left = [one for one in found if one.messages]
    if not left:
        raise InputError(
            f"a compressed context must hold something, but {PACKAGE} left nothing of it; leave "
            f"its rivals out"
        )
    fitting = [one for one in left if one.tokens <= most]
    if fitting:
        return max(fitting, key=lambda one: one.tokens)
    return min(left, key=lambda one: one.tokens)


def llmlingua(setup: Setup, messages: Sequence[Message]) -> Compress:
    """LLMLingua on a context that lacks nothing, ranking by the model that is prompted with it.

    Raises InputError where it fails.
    """
    from opcd.studies.ranker import Ranker

    instruction, turns = split_system(messages)
    shown = demonstrations_in(turns)
    if shown:
        texts = [f"{one.request}\n{one.answer}" for one in shown]
        segments = [[one.request, f"\n{one.answer}"] for one in shown]
    else:
        assert instruction is not None, "a context holds something"
        texts, segments = [instruction["content"]], [[instruction["content"]]]
    may_lose = [[True, False][: len(parts)] for parts in segments]
    size = sum(len(setup.tokenizer(t, add_special_tokens=False).input_ids) for t in texts)
    ranker = Ranker(setup.load(setup.config.model, torch.float32), setup.tokenizer)

    def compress(rate: float) -> list[Message]:
        try:
            found: dict[str, Any] = ranker.compress_prompt(
                texts,
                rate=rate,
                iterative_size=max(1, min(PASS, size // 2)),  # or a short one stays as it is
                context_segs=segments,
                context_segs_rate=[[rate if may else 1.0 for may in parts] for parts in may_lose],
                context_segs_compress=may_lose,
                strict_preserve_uncompressed=False,  # whole demonstrations may go
            )
        except Exception as error:
            raise InputError(
                f"{PACKAGE} must be able to compress the context, got {type(error).__name__} "
                f"({error}) at a rate of {rate:.3g}; leave its rivals out"
            ) from error
        text: str = found["compressed_prompt"]
        if not shown:
            return [system(text)] if text.strip() else []
        kept = still_shown(text, [one.answer for one in shown])
        front = [instruction] if instruction else []
        return [*front, *(t for one in kept for t in (user(one.request), assistant(one.answer)))]

    return compress


def demonstrations_in(turns: Sequence[Message]) -> list[Shown]:
    """A context's turns, pairs of a user's and an assistant's, with requests of one line."""
    return [
        Shown(" ".join(asked["content"].split()), said["content"])
        for asked, said in zip(turns[::2], turns[1::2], strict=True)
    ]


def still_shown(text: str, answers: Sequence[str]) -> list[Shown]:
    """The demonstrations that a compressed text still holds: a line in front of a whole answer.

    Where tokens of an answer were lost all the same, its demonstration is.
    """
    known = "|".join(map(re.escape, sorted({*answers}, key=len, reverse=True)))
    pieces = re.split(rf"\n({known})(?:\n+|\Z)", text)
    found = [
        Shown(words.rpartition("\n")[2].strip(), answer)
        for words, answer in zip(pieces[::2], pieces[1::2], strict=False)
    ]
    return [one for one in found if one.request]
