"""Conversations in static caches."""

import functools
from collections.abc import Mapping, Sequence

import torch

from opcd.models.lm import causal_lm, eos_token_ids
from opcd.passes.prefix import SharedPrefix, common_prefix
from opcd.rollouts.decode import Decoder, rounded_length, uncached_autocast
from opcd.rollouts.protocol import SamplingParams


class StaticBatches:
    """Rows whose keys and values are kept as `decode.py` does; memory grows with them."""

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],  # what rows begin with, now and later
        max_tokens_per_pass: int,
        graphed: bool,  # whether a step is recorded
    ) -> None:
        self._model = model
        self._prompts = prompts
        self._max_tokens_per_pass = max_tokens_per_pass
        self._eos = eos_token_ids(model)
        self._graphed = graphed

    def rows(self, size: int) -> int:
        """See Batches.rows."""
        return size

    def begun(self, held: Mapping[int, list[int]], params: SamplingParams | None) -> "_StaticBatch":
        """See Batches.begun."""
        length = max(map(len, held.values()))
        truncates = False
        if params is not None:
            length, truncates = length + params.max_completion_tokens, params.truncates
        with self.arithmetic():
            decoder = self.decoder(len(held), length, truncates)
            decoder.place([*held.values()], self._prefix)
        return _StaticBatch(self, [*held], decoder, self._eos)

    def decoder(self, rows: int, length: int, truncates: bool) -> Decoder:
        """An empty one."""
        length = rounded_length(length)
        decoder = Decoder(
            self._model, rows, length, self._eos, self._max_tokens_per_pass, truncates
        )
        if self._graphed:
            decoder.capture()
        return decoder

    def arithmetic(self) -> torch.autocast:
        """In which decoders are made and used."""
        return uncached_autocast(causal_lm(self._model).device)

    @functools.cached_property
    def _prefix(self) -> SharedPrefix | None:
        return common_prefix(self._model, self._prompts)


class _StaticBatch:
    """A decoder, and another where rows outgrow it."""

    def __init__(
        self, of: StaticBatches, rows: list[int], decoder: Decoder, eos: Sequence[int]
    ) -> None:
        self._of = of
        self._place = {row: place for place, row in enumerate(rows)}
        self._decoder = decoder
        self._eos = eos

    def complete(
        self, held: Mapping[int, list[int]], params: SamplingParams, streams: Mapping[int, int]
    ) -> dict[int, list[int]]:
        """See Batch.complete."""
        with self._of.arithmetic():
            needed = max(map(len, held.values())) + params.max_completion_tokens
            decoder = self._roomy(needed, params.truncates)
            numbers = torch.tensor([streams[row] for row in held])
            decoder.start([self._place[row] for row in held], params, numbers)
            decoder.run(params)
            sequences = decoder.sequences()
            found = {}
            for row, tokens in held.items():
                new = sequences[self._place[row]][len(tokens) :]
                found[row], _ = params.finished(new, self._eos)
            if params.stop is not None:
                decoder.cut({self._place[row]: len(held[row]) + len(found[row]) for row in held})
        return found

    def extend(self, held: Mapping[int, list[int]], new: Mapping[int, list[int]]) -> None:
        """See Batch.extend."""
        with self._of.arithmetic():
            decoder = self._roomy(max(len(held[row]) + len(new[row]) for row in held))
            decoder.extend(
                {self._place[row]: tokens for row, tokens in held.items()},
                {self._place[row]: new[row] for row in held},
            )

    def _roomy(self, length: int, truncates: bool = False) -> Decoder:
        """The decoder, with room for rows of that length: doubled, if at all."""
        held = self._decoder
        if held.length < length or (truncates and not held.truncates):
            length = held.length if held.length >= length else max(length, 2 * held.length)
            grown = self._of.decoder(held.rows, length, truncates or held.truncates)
            grown.adopt(held)
            self._decoder = grown
        return self._decoder
