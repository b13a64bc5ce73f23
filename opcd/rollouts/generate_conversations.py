"""Conversations by `transformers.generate`, whose cache goes on from turn to turn."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from opcd.models.lm import cache_of
from opcd.passes.prefix import common_prefix
from opcd.rollouts.conversations import GrowingRows
from opcd.rollouts.generate_call import allows_gaps, generated
from opcd.rollouts.generate_histories import shared_branches, with_histories, worth_a_pass
from opcd.rollouts.protocol import SamplingParams


class _Rectangle:
    """Rows of one batch: the columns that the cache holds, and each row's tokens behind them."""

    def __init__(
        self,
        rows: list[int],  # their numbers among all
        prompts: Sequence[Sequence[int]],
        cache: Cache | None,
        columns: int,  # of the cache
        starts: Sequence[int],  # tokens of each prompt that it holds, in its first columns
    ) -> None:
        self.rows = rows
        self.cache = cache
        self.ids = torch.zeros(len(rows), columns, dtype=torch.long)
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


class GeneratedConversations(GrowingRows):
    """Conversations through `transformers.generate`, whose cache goes on from turn to turn.

    A row that ends its turn before others of its batch is padded behind it, and the pads masked.
    Where a model's layers do not allow that (sliding windows, recurrent states), each row is a
    batch of its own.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        share_prefix: bool,
        version: int,
    ) -> None:
        super().__init__(model, prompts, version)
        prefix = common_prefix(model, prompts) if share_prefix else None
        together = share_prefix and allows_gaps(model, prompts[0], prefix)
        size, shared = batch_size if together else 1, len(prefix) if prefix is not None else 0
        self._batches: list[_Rectangle] = []
        for start in range(0, len(prompts), size):
            rows = [*range(start, min(start + size, len(prompts)))]
            some = [prompts[i] for i in rows]
            found = shared_branches(model, some, shared) if together else []
            if worth_a_pass(found, shared):
                cache, columns = with_histories(model, some, found, prefix, self._eos[0])
                starts = [branch.length for branch in found]
            else:
                cache = prefix.expand(len(rows)) if prefix is not None else None
                columns, starts = shared, [shared] * len(rows)
            self._batches.append(_Rectangle(rows, some, cache, columns, starts))

    def close(self) -> None:
        """See Conversations.close."""
        super().close()
        self._batches = []

    @torch.no_grad()
    def _completed(
        self, rows: Sequence[int], params: SamplingParams, streams: Tensor
    ) -> list[list[int]]:
        stream_of = dict(zip(rows, streams.tolist(), strict=True))
        found: dict[int, list[int]] = {}
        for batch in self._batches:
            here = [row for row in batch.rows if row in stream_of]
            if not here:
                continue
            batch.keep(here)
            batch.widened(self._eos[0])
            width = batch.ids.shape[1]
            numbers = torch.tensor([stream_of[row] for row in here])
            output = generated(
                self._model, batch.ids, batch.mask, batch.cache, self._eos, params, numbers
            )
            sequences = output.sequences.cpu()
            cached = sequences.shape[1] - 1  # the newest column was not computed
            real = torch.zeros(len(here), cached - width, dtype=batch.mask.dtype)
            for place, row in enumerate(here):
                ids, _ = params.finished(sequences[place, width:].tolist(), self._eos)
                real[place, : len(ids)] = 1
                batch.pending[place] = ids[cached - width :]
                found[row] = ids
            batch.cache = cache_of(output)
            batch.ids, batch.mask = sequences[:, :-1], torch.cat([batch.mask, real], 1)
        return [found[row] for row in rows]

    def _extend(self, new: dict[int, list[int]]) -> None:
        for batch in self._batches:
            for place, row in enumerate(batch.rows):
                batch.pending[place] += new.get(row, [])
