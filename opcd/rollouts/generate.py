"""Completions by `transformers.generate`."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from opcd.errors import InputError
from opcd.models.lm import eos_token_ids
from opcd.passes.prefix import SharedPrefix, common_prefix
from opcd.rollouts.fitting import BatchSize
from opcd.rollouts.generate_call import generated, until_eos
from opcd.rollouts.generate_conversations import GeneratedConversations
from opcd.rollouts.protocol import Rollout, SamplingParams, stream_tensor
from opcd.runtime.batches import batches_by_tokens

# Decoding costs about as much for many rows as for few: short ones may be more than `batch_size`,
# as long as they hold no more tokens than that many rows of this length.
TOKENS_A_ROW = 512


def batch_rows(batch_size: int, total_tokens: int) -> int:
    """Sequences of at most so many tokens, completion included, that are sampled at once."""
    return max(batch_size, batch_size * TOKENS_A_ROW // max(total_tokens, 1))


class TransformersEngine:
    """`transformers.generate` on the trained module itself: its weights are never stale.

    What all prompts of a call start with (a context, a default system message) is computed once,
    unless `share_prefix` is off: then nothing is assumed of the model's cache and its masks, and
    only prompts of one length are batched. A pass over prompts holds at most `max_tokens_per_pass`
    new tokens, pads included; a longer prompt is a pass alone. Where memory runs out, fewer are
    sampled at once.
    """

    name = "generate"

    def __init__(
        self,
        model: torch.nn.Module,
        batch_size: int = 32,
        share_prefix: bool = True,
        max_tokens_per_pass: int = 4096,
    ) -> None:
        self._share_prefix = share_prefix
        self._model = model
        self._batch = BatchSize(batch_size)
        self._max_tokens_per_pass = max_tokens_per_pass
        self._eos = eos_token_ids(model)
        self._version = 0

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """See RolloutEngine.generate."""
        numbers = stream_tensor(streams, prompts, params)
        total = max(map(len, prompts), default=0) + params.max_completion_tokens

        def rows(size: int) -> int:
            return min(max(1, len(prompts)), batch_rows(size, total))

        try:
            return self._batch.fitting(
                lambda: self._generated(prompts, params, numbers, rows(self._batch.size)), rows
            )
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"a rollout must fit the GPU's memory, but one sequence of up to {total} tokens "
                f"alone does not: {str(error).splitlines()[0]}; lower max_completion_tokens, "
                f"shorten the context, or take a smaller model"
            ) from error

    def _generated(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, numbers: Tensor, size: int
    ) -> list[Rollout]:
        prefix = common_prefix(self._model, prompts) if self._share_prefix else None
        completions: dict[int, list[int]] = {}
        lengths = [len(p) for p in prompts]
        total = max(lengths, default=0) + params.max_completion_tokens
        pads = self._share_prefix if prefix is None else prefix.allows_pads(total)
        shared = len(prefix) if prefix is not None else 0
        for batch in self._batches(lengths, pads, size, shared):
            output = self._generate_batch(
                [prompts[i] for i in batch], params, numbers[batch], prefix
            )
            completions.update(zip(batch, output, strict=True))
        rollouts = []
        for i, prompt in enumerate(prompts):
            ids = completions[i]
            reason = "stop" if ids and ids[-1] in self._eos else "length"
            rollouts.append(Rollout(list(prompt), ids, reason, self._version))
        return rollouts

    @torch.no_grad()
    def open(self, prompts: Sequence[Sequence[int]]) -> GeneratedConversations:
        """See RolloutEngine.open."""
        return GeneratedConversations(
            self._model, prompts, self._batch.size, self._share_prefix, self._version
        )

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """The weights are shared: only the version changes."""
        assert student is self._model, "this engine samples from the module that is trained"
        self._version = version

    def close(self) -> None:
        """Nothing is held."""

    def _batches(
        self, lengths: Sequence[int], pads: bool, size: int, shared: int
    ) -> Iterator[list[int]]:
        """At most `size` rows each, and in them at most so many tokens behind the shared ones."""

        def batches(indices: Sequence[int]) -> Iterator[list[int]]:
            new = [lengths[i] - shared for i in indices]
            for batch in batches_by_tokens(new, self._max_tokens_per_pass):
                for start in range(0, len(batch), size):
                    yield [indices[k] for k in batch[start : start + size]]

        if pads:
            yield from batches(range(len(lengths)))
            return
        for length in sorted(set(lengths)):
            yield from batches([i for i, x in enumerate(lengths) if x == length])

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Tensor,  # (B,)
        prefix: SharedPrefix | None,
    ) -> list[list[int]]:
        shared = len(prefix) if prefix is not None else 0
        pad, width = self._eos[0], max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad)  # (B, T): prefix, pads, the rest of the prompt
        mask = torch.zeros_like(ids)
        for row, kept, prompt in zip(ids, mask, prompts, strict=True):
            tokens = torch.tensor(prompt)
            row[:shared], row[width - len(prompt) + shared :] = tokens[:shared], tokens[shared:]
            kept[:shared], kept[width - len(prompt) + shared :] = 1, 1
        cache = prefix.expand(len(prompts)) if prefix is not None else None
        output = generated(self._model, ids, mask, cache, self._eos, params, streams)
        return [until_eos(row, self._eos) for row in output.sequences[:, width:].tolist()]
