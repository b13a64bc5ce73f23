"""Conversations by `transformers.generate`, whose cache goes on from turn to turn."""

import functools
from collections.abc import Mapping, Sequence

import torch
from transformers.cache_utils import Cache

from opcd.models.lm import cache_of, eos_token_ids
from opcd.passes.prefix import SharedPrefix, common_prefix
from opcd.rollouts.generate_call import allows_gaps, generated
from opcd.rollouts.generate_histories import shared_branches, with_histories, worth_a_pass
from opcd.rollouts.padding import pads_are_neutral
from opcd.rollouts.protocol import SamplingParams


class GeneratedBatches:
    """Rows through `transformers.generate`, whose cache goes on from turn to turn.

    A row that ends its turn before others of its batch is padded behind it, and the pads masked.
    Where a model's layers do not allow that (sliding windows, recurrent states), each row is a
    batch of its own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],  # what rows begin with, now and later
        share_prefix: bool,
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._share_prefix = share_prefix
        self._eos = eos_token_ids(model)

    def rows(self, size: int) -> int:
        """See Batches.rows."""
        return size if self._together else 1

    def begun(self, held: Mapping[int, list[int]], params: SamplingParams | None) -> "_Rectangle":
        """See Batches.begun."""
        prefix, prompts = self._prefix, [*held.values()]
        shared = len(prefix) if prefix is not None else 0
        found = shared_branches(self._model, prompts, shared) if self._together else []
        cache: Cache | None
        if worth_a_pass(found, shared):
            cache, columns = with_histories(self._model, prompts, found, prefix, self._eos[0])
            starts = [branch.length for branch in found]
        else:
            cache = prefix.expand(len(held)) if prefix is not None else None
            columns, starts = shared, [shared] * len(held)
        return _Rectangle(self._model, self._eos, held, cache, columns, starts)

    @functools.cached_property
    def _prefix(self) -> SharedPrefix | None:
        return common_prefix(self._model, self._prompts) if self._share_prefix else None

    @functools.cached_property
    def _together(self) -> bool:
        return (
            self._share_prefix
            and allows_gaps(self._model, self._prompts[0], self._prefix)
            and pads_are_neutral(self._model)
        )


class _Rectangle:
    """Rows of one batch: the columns that the cache holds, and each row's tokens behind them."""

    def __init__(
        self,
        model: torch.nn.Module,
        eos: Sequence[int],
        held: Mapping[int, list[int]],  # by their numbers among all
        cache: Cache | None,
        columns: int,  # of the cache
        starts: Sequence[int],  # tokens of each prompt that it holds, in its first columns
    ) -> None:
        prompts = [*held.values()]
        self._model = model
        self._eos = eos
        self.rows = [*held]
        self.cache = cache
        self.ids = torch.zeros(len(prompts), columns, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        for ids, mask, prompt, start in zip(self.ids, self.mask, prompts, starts, strict=True):
            ids[:start], mask[:start] = torch.tensor(prompt[:start], dtype=torch.long), 1
        self.pending = [list(p[start:]) for p, start in zip(prompts, starts, strict=True)]

    def widened(self, pad: int) -> None:
        """Put what is pending into columns, pads in front."""
        width = max(map(len, self.pending))
        new = torch.full((len(self.rows), width), pad)
        real = torch.zeros_like(new)
        for row, kept, tokens in zip(new, real, self.pending, strict=True):
            row[width - len(tokens) :], kept[width - len(tokens) :] = torch.tensor(tokens), 1
        self.ids = torch.cat([self.ids, new], 1)
        self.mask = torch.cat([self.mask, real], 1)
        self.pending = [[] for _ in self.rows]

    def keep(self, rows: Sequence[int]) -> None:
        """Leave the others out."""
        places = torch.tensor([self.rows.index(row) for row in rows], dtype=torch.long)
        if len(places) == len(self.rows):
            return
        if self.cache is not None:
            self.cache.batch_select_indices(places)
        self.ids, self.mask = self.ids[places], self.mask[places]
        self.pending = [self.pending[i] for i in places.tolist()]
        self.rows = list(rows)

    def complete(
        self, held: Mapping[int, list[int]], params: SamplingParams, streams: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """See Batch.complete."""
        self.keep([*held])
        self.widened(self._eos[0])
        width = self.ids.shape[1]
        numbers = torch.tensor([streams[row] for row in held])
        output = generated(self._model, self.ids, self.mask, self.cache, self._eos, params, numbers)
        sequences = output.sequences.cpu()
        cached = sequences.shape[1] - 1  # the newest column was not computed
        real = torch.zeros(len(held), cached - width, dtype=self.mask.dtype)
        found = {}
        for place, row in enumerate(self.rows):
            ids, _ = params.finished(sequences[place, width:].tolist(), self._eos)
            real[place, : len(ids)] = 1
            self.pending[place] = ids[cached - width :]
            found[row] = ids
        self.cache = cache_of(output)
        self.ids, self.mask = sequences[:, :-1], torch.cat([self.mask, real], 1)
        return found

    def extend(self, held: Mapping[int, list[int]], new: Mapping[int, list[int]]) -> None:
        """See Batch.extend."""
        for place, row in enumerate(self.rows):
            self.pending[place] += new.get(row, [])
