"""Conversations that grow by turns: what is the same of them for every engine."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from opcd.errors import InputError
from opcd.models.lm import causal_lm, eos_token_ids, max_positions, rope_differs
from opcd.rollouts.capture import GraphError
from opcd.rollouts.fitting import BatchSize, freed, too_long
from opcd.rollouts.protocol import Rollout, SamplingParams, stream_tensor


class Batch(Protocol):
    """Keys and values of some rows. `held`: all tokens of each so far."""

    def complete(
        self, held: Mapping[int, list[int]], params: SamplingParams, streams: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """A completion of each of these rows, its end included. Others never ask again."""
        ...

    def extend(self, held: Mapping[int, list[int]], new: Mapping[int, list[int]]) -> None:
        """Tokens come behind these rows."""
        ...


class Batches(Protocol):
    """What an engine makes of the rows of conversations."""

    def rows(self, size: int) -> int:
        """How many may be in a batch where `size` are sampled at once."""
        ...

    def begun(self, held: Mapping[int, list[int]], params: SamplingParams | None) -> Batch:
        """A batch of these rows, which hold these tokens, and how they are completed at once."""
        ...


# From the reason why: what goes on where an engine cannot.
Instead = Callable[[str], tuple[BatchSize, Batches]]


class GrowingRows:
    """The tokens of each row, and who may be appended to; keys and values of them in batches.

    A batch can be let go and begun anew from the tokens. Where memory runs out all are; then there
    is one at a time, at last fewer rows in it (`fitting.py`), and where not one fits, or CUDA
    refuses a graph, `instead` says how to go on.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        version: int,
        size: BatchSize,
        kind: Batches,
        instead: Instead | None = None,
    ) -> None:
        if not all(prompts):
            raise ValueError("a conversation must begin with at least one token, got none")
        self._model = model
        self._tokens = [list(prompt) for prompt in prompts]
        self._open = [True] * len(prompts)
        self._eos = eos_token_ids(model)
        self._version = version
        self._size = size
        self._kind = kind
        self._instead = instead
        self._batches: list[tuple[list[int], Batch]] = []  # rows and what holds them
        self._holding(self._begin, 0)

    @property
    def token_ids(self) -> list[list[int]]:
        """See Conversations.token_ids."""
        return [list(tokens) for tokens in self._tokens]

    def complete(
        self, params: SamplingParams, streams: Sequence[int] | None = None
    ) -> list[Rollout | None]:
        """See Conversations.complete."""
        numbers = stream_tensor(streams, self._tokens, params)
        rows = [row for row, goes_on in enumerate(self._open) if goes_on]
        self._check_length(rows, [params.max_completion_tokens] * len(rows))
        found: list[Rollout | None] = [None] * len(self._tokens)
        streams_of = {row: int(numbers[row]) for row in rows}
        completions = self._complete(streams_of, params) if rows else {}
        for row in rows:
            ids, reason = params.finished(completions[row], self._eos)
            found[row] = Rollout(list(self._tokens[row]), ids, reason, self._version)
            self._tokens[row] += ids
        return found

    def append(self, token_ids: Sequence[Sequence[int]]) -> None:
        """See Conversations.append."""
        if len(token_ids) != len(self._tokens):
            raise ValueError(
                f"there must be tokens for each row, [] for one that ends, got {len(token_ids)} "
                f"for {len(self._tokens)}"
            )
        new = {row: list(ids) for row, ids in enumerate(token_ids) if ids}
        if ended := [row for row in new if not self._open[row]]:
            raise ValueError(f"rows {ended} have ended, and nothing can be put behind them")
        if new:
            self._check_length([*new], [*map(len, new.values())])
            self._extend(new)
        for row, ids in new.items():
            self._tokens[row] += ids
        self._open = [row in new for row in range(len(self._tokens))]

    def close(self) -> None:
        """See Conversations.close."""
        self._open = [False] * len(self._tokens)
        self._batches = []

    def _begin(self) -> None:
        """Compute what all rows begin with, where all can be held until they are completed."""
        if self._size.holds_all:
            self._in_batches([*range(len(self._tokens))], lambda batch, held: None, None)

    def _complete(
        self, streams: Mapping[int, int], params: SamplingParams
    ) -> Mapping[int, list[int]]:
        """A completion of each row that has a stream, its end included."""
        found: dict[int, list[int]] = {}

        def complete(batch: Batch, held: dict[int, list[int]]) -> None:
            found.update(batch.complete(held, params, {row: streams[row] for row in held}))

        self._holding(
            lambda: self._in_batches([*streams], complete, params), params.max_completion_tokens
        )
        return found

    def _extend(self, new: Mapping[int, list[int]]) -> None:
        """Tokens come behind these rows, which hold `self._tokens` up to now."""

        def extend(batch: Batch, held: dict[int, list[int]]) -> None:
            batch.extend(held, {row: new[row] for row in held})

        # What is not held is begun with all its tokens when it is completed.
        self._holding(
            lambda: self._in_batches([*new], extend, None) if self._batches else None,
            max(map(len, new.values())),
        )

    def _in_batches(
        self,
        rows: Sequence[int],
        call: Callable[[Batch, dict[int, list[int]]], None],
        params: SamplingParams | None,
    ) -> None:
        """`call` for each batch and the tokens of its rows that are wanted.

        Where none is held it is begun with these rows alone: the others have ended.
        """
        tokens = {row: self._tokens[row] for row in rows}
        if self._batches:
            for of_batch, batch in self._batches:
                if held := {row: tokens[row] for row in of_batch if row in tokens}:
                    call(batch, held)
            return
        most = self._kind.rows(self._size.size)
        for start in range(0, len(rows), most):
            held = {row: tokens[row] for row in rows[start : start + most]}
            batch = self._kind.begun(held, params)
            if self._size.holds_all:
                self._batches.append(([*held], batch))
            call(batch, held)
            del batch  # before the next is begun

    @torch.no_grad()
    def _holding(self, call: Callable[[], None], more: int) -> None:
        """`call()`, again where it did not fit; rows become longer by up to `more` tokens."""
        try:
            return self._size.holding(call, self._let_go, self._rows)
        except (torch.OutOfMemoryError, GraphError) as error:
            if self._instead is None:
                if isinstance(error, GraphError):
                    raise
                raise too_long(max(map(len, self._tokens)) + more, error) from error
            reason, instead = str(error).splitlines()[0], self._instead
        self._let_go()
        freed()
        self._instead = None
        self._size, self._kind = instead(reason)
        return self._holding(call, more)

    def _let_go(self) -> None:
        self._batches = []

    def _rows(self, size: int) -> int:
        return min(max(1, sum(self._open)), self._kind.rows(size))

    def _check_length(self, rows: Sequence[int], more: Sequence[int]) -> None:
        """Raise InputError for a row that grows beyond what the model was made for."""
        config = causal_lm(self._model).config
        limit = max_positions(config) or 2**31
        for row, n in zip(rows, more, strict=True):
            now = len(self._tokens[row])
            if now + n > limit:
                raise InputError(
                    f"a conversation must fit the model's {limit} positions, got row {row} with "
                    f"{now} tokens and {n} more to come; end it"
                )
            if rope_differs(config, now, now + n):
                raise InputError(
                    f"a conversation must stay where {type(causal_lm(self._model)).__name__} turns "
                    f"positions alike, but that changes between row {row}'s {now} tokens and {n} "
                    f"more; end it"
                )
