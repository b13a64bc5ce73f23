"""Conversations in static caches."""

from collections.abc import Sequence

import torch
from torch import Tensor

from opcd.models.lm import causal_lm
from opcd.passes.prefix import common_prefix
from opcd.rollouts.conversations import GrowingRows
from opcd.rollouts.decode import Decoder, rounded_length, uncached_autocast
from opcd.rollouts.protocol import SamplingParams


class StaticConversations(GrowingRows):
    """Conversations whose keys and values are kept as `decode.py` does; memory grows with them."""

    def __init__(
        self,
        model: torch.nn.Module,
        prompts: Sequence[Sequence[int]],
        batch_size: int,
        version: int,
        max_tokens_per_pass: int = 4096,
    ) -> None:
        super().__init__(model, prompts, version)
        self._max_tokens_per_pass = max_tokens_per_pass
        self._graphed = causal_lm(model).device.type == "cuda"
        self._batches: list[range] = []
        self._decoders: list[Decoder] = []
        with uncached_autocast(causal_lm(model).device):
            prefix = common_prefix(model, prompts)
            for start in range(0, len(prompts), batch_size):
                batch = range(start, min(start + batch_size, len(prompts)))
                decoder = self._made(len(batch), max(len(prompts[i]) for i in batch), False)
                decoder.place([prompts[i] for i in batch], prefix)
                self._batches.append(batch)
                self._decoders.append(decoder)

    def close(self) -> None:
        """See Conversations.close."""
        super().close()
        self._decoders = []

    def _made(self, rows: int, length: int, truncates: bool) -> Decoder:
        length = rounded_length(length)
        decoder = Decoder(
            self._model, rows, length, self._eos, self._max_tokens_per_pass, truncates
        )
        if self._graphed:
            decoder.capture()
        return decoder

    @torch.no_grad()
    def _completed(
        self, rows: Sequence[int], params: SamplingParams, streams: Tensor
    ) -> list[list[int]]:
        wanted = set(rows)
        stream_of = dict(zip(rows, streams.tolist(), strict=True))
        found: dict[int, list[int]] = {}
        with uncached_autocast(causal_lm(self._model).device):
            for number, batch in enumerate(self._batches):
                here = [row for row in batch if row in wanted]
                if not here:
                    continue
                needed = max(len(self._tokens[row]) for row in here) + params.max_completion_tokens
                decoder = self._roomy(number, needed, params.truncates)
                decoder.start(
                    [row - batch.start for row in here],
                    params,
                    torch.tensor([stream_of[row] for row in here]),
                )
                decoder.run(params)
                sequences = decoder.sequences()
                for row in here:
                    new = sequences[row - batch.start][len(self._tokens[row]) :]
                    found[row], _ = params.finished(new, self._eos)
                if params.stop is not None:
                    decoder.cut(
                        {r - batch.start: len(self._tokens[r]) + len(found[r]) for r in here}
                    )
        return [found[row] for row in rows]

    @torch.no_grad()
    def _extend(self, new: dict[int, list[int]]) -> None:
        with uncached_autocast(causal_lm(self._model).device):
            for number, batch in enumerate(self._batches):
                here = [row for row in batch if row in new]
                if not here:
                    continue
                needed = max(len(self._tokens[row]) + len(new[row]) for row in here)
                self._roomy(number, needed).extend(
                    {row - batch.start: self._tokens[row] for row in here},
                    {row - batch.start: new[row] for row in here},
                )

    def _roomy(self, number: int, length: int, truncates: bool = False) -> Decoder:
        """The decoder of a batch, with room for rows of that length: doubled, if at all."""
        held = self._decoders[number]
        if held.length < length or (truncates and not held.truncates):
            length = held.length if held.length >= length else max(length, 2 * held.length)
            grown = self._made(held.rows, length, truncates or held.truncates)
            grown.adopt(held)
            self._decoders[number] = grown
        return self._decoders[number]
