"""Conversations that grow by turns: what is the same of them for every engine."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.models.lm import causal_lm, eos_token_ids, max_positions, rope_differs
from opcd.rollouts.protocol import Rollout, SamplingParams, stream_tensor


class GrowingRows(ABC):
    """The tokens of each row, and who may be appended to; engines keep keys and values of them."""

    def __init__(
        self, model: torch.nn.Module, prompts: Sequence[Sequence[int]], version: int
    ) -> None:
        if not all(prompts):
            raise ValueError("a conversation must begin with at least one token, got none")
        self._model = model
        self._tokens = [list(prompt) for prompt in prompts]
        self._open = [True] * len(prompts)
        self._eos = eos_token_ids(model)
        self._version = version

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
        completions = self._completed(rows, params, numbers[rows]) if rows else []
        for row, ids in zip(rows, completions, strict=True):
            ids, reason = params.finished(ids, self._eos)
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

    @abstractmethod
    def _completed(
        self,
        rows: Sequence[int],
        params: SamplingParams,
        streams: Tensor,  # (len(rows),) int64
    ) -> list[list[int]]:
        """A completion of each of these rows, its end included."""

    @abstractmethod
    def _extend(self, new: dict[int, list[int]]) -> None:
        """Tokens come behind these rows, which hold `self._tokens` up to now."""

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
