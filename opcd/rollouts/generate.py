"""Completions by `transformers.generate`."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from opcd.models.lm import eos_token_ids
from opcd.passes.prefix import SharedPrefix, common_prefix
from opcd.rollouts.conversations import GrowingRows
from opcd.rollouts.fitting import BatchSize, too_long
from opcd.rollouts.generate_call import allows_gaps, generated
from opcd.rollouts.generate_conversations import GeneratedBatches
from opcd.rollouts.generate_histories import shared_branches, with_histories, worth_a_pass
from opcd.rollouts.histories import Branch, batches_by_history
from opcd.rollouts.padding import pads_are_neutral
from opcd.rollouts.protocol import Conversations, Rollout, SamplingParams, stream_tensor

# Decoding costs about as much for many rows as for few: short ones may be more than `batch_size`,
# as long as they hold no more tokens than that many rows of this length.
TOKENS_A_ROW = 512


def batch_rows(batch_size: int, total_tokens: int) -> int:
    """Sequences of at most so many tokens, completion included, that are sampled at once."""
    return max(batch_size, batch_size * TOKENS_A_ROW // max(total_tokens, 1))


class TransformersEngine:
    """`transformers.generate` on the trained module itself: its weights are never stale.

    What all prompts of a call start with (a context, a default system message) is computed once,
    and so is a history that several go on from; unless `share_prefix` is off: then nothing is
    assumed of the model's cache and its masks, and only prompts of one length are batched. A pass
    over prompts holds at most `max_tokens_per_pass` new tokens, pads included; a longer prompt is
    a pass alone. Where memory runs out, fewer are sampled at once.
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
            raise too_long(total, error) from error

    def _generated(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams, numbers: Tensor, size: int
    ) -> list[Rollout]:
        prefix = common_prefix(self._model, prompts) if self._share_prefix else None
        completions: dict[int, tuple[list[int], str]] = {}
        lengths = [len(p) for p in prompts]
        total = max(lengths, default=0) + params.max_completion_tokens
        pads = self._share_prefix if prefix is None else prefix.allows_pads(total)
        pads = pads and (len(set(lengths)) < 2 or pads_are_neutral(self._model))
        shared = len(prefix) if prefix is not None else 0
        batches = (
            batches_by_history(prompts, shared, size) if pads else _of_one_length(lengths, size)
        )
        for batch in self._of_one_pass(batches, prompts, shared):
            output = self._generate_batch(
                [prompts[i] for i in batch], params, numbers[batch], prefix
            )
            completions.update(zip(batch, output, strict=True))
        rollouts = []
        for i, prompt in enumerate(prompts):
            ids, reason = completions[i]
            rollouts.append(Rollout(list(prompt), ids, reason, self._version))
        return rollouts

    @torch.no_grad()
    def open(self, prompts: Sequence[Sequence[int]]) -> Conversations:
        """See RolloutEngine.open."""
        return GrowingRows(self._model, prompts, self._version, *self.growing(prompts))

    def growing(self, prompts: Sequence[Sequence[int]]) -> tuple[BatchSize, GeneratedBatches]:
        """How conversations that begin with these tokens are held."""
        return self._batch, GeneratedBatches(self._model, prompts, self._share_prefix)

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """The weights are shared: only the version changes."""
        assert student is self._model, "this engine samples from the module that is trained"
        self._version = version

    def close(self) -> None:
        """Nothing is held."""

    def _of_one_pass(
        self, batches: Iterable[list[int]], prompts: Sequence[Sequence[int]], shared: int
    ) -> Iterator[list[int]]:
        """The batches, halved until what is computed behind the shared tokens fits a pass."""
        for batch in batches:
            found = self._branches([prompts[i] for i in batch], shared)
            trunks = [b.length - shared for i, b in enumerate(found) if b.trunk == i]
            rests = [len(prompts[i]) - b.length for i, b in zip(batch, found, strict=True)]
            if not worth_a_pass(found, shared):
                trunks, rests = [], [len(prompts[i]) - shared for i in batch]
            tokens = max(len(x) * max(x, default=0) for x in (trunks, rests))
            if len(batch) == 1 or tokens <= self._max_tokens_per_pass:
                yield batch
            else:
                half = len(batch) // 2
                yield from self._of_one_pass((batch[:half], batch[half:]), prompts, shared)

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Tensor,  # (B,)
        prefix: SharedPrefix | None,
    ) -> list[tuple[list[int], str]]:
        shared = len(prefix) if prefix is not None else 0
        cache = prefix.expand(len(prompts)) if prefix is not None else None
        starts = [shared] * len(prompts)  # tokens of each prompt that the cache holds
        columns = shared
        found = self._branches(prompts, shared)
        if (
            worth_a_pass(found, shared)
            and allows_gaps(self._model, prompts[0], prefix)
            and pads_are_neutral(self._model)
        ):
            cache, columns = with_histories(self._model, prompts, found, prefix, self._eos[0])
            starts = [branch.length for branch in found]
        width = columns + max(len(p) - start for p, start in zip(prompts, starts, strict=True))
        pad = self._eos[0]
        ids = torch.full((len(prompts), width), pad)  # (B, T): what is held, pads, the rest
        mask = torch.zeros_like(ids)
        for row, kept, prompt, start in zip(ids, mask, prompts, starts, strict=True):
            tokens, rest = torch.tensor(prompt), width - (len(prompt) - start)
            row[:start], row[rest:] = tokens[:start], tokens[start:]
            kept[:start], kept[rest:] = 1, 1
        output = generated(self._model, ids, mask, cache, self._eos, params, streams)
        return [params.finished(row, self._eos) for row in output.sequences[:, width:].tolist()]

    def _branches(self, prompts: Sequence[Sequence[int]], shared: int) -> list[Branch]:
        """What prompts share; each for itself where nothing is assumed of the model's cache, or a
        history alone would be given other rotary frequencies."""
        if self._share_prefix:
            return shared_branches(self._model, prompts, shared)
        return [Branch(i, len(prompt) - 1) for i, prompt in enumerate(prompts)]


def _of_one_length(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    for length in sorted(set(lengths)):
        same = [i for i, x in enumerate(lengths) if x == length]
        for start in range(0, len(same), size):
            yield same[start : start + size]
