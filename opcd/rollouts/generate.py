"""Completions by `transformers.generate`."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from opcd.models.lm import causal_lm, eos_token_ids
from opcd.passes.prefix import SharedPrefix, common_prefix
from opcd.rollouts.noise import drawn, uniforms
from opcd.rollouts.protocol import Rollout, SamplingParams, stream_tensor
from opcd.runtime.batches import batches_by_length

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
    only prompts of one length are batched.
    """

    name = "generate"

    def __init__(
        self, model: torch.nn.Module, batch_size: int = 32, share_prefix: bool = True
    ) -> None:
        self._share_prefix = share_prefix
        self._model = model
        self._batch_size = batch_size
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
        prefix = common_prefix(self._model, prompts) if self._share_prefix else None
        completions: dict[int, list[int]] = {}
        lengths = [len(p) for p in prompts]
        total = max(lengths, default=0) + params.max_completion_tokens
        pads = self._share_prefix if prefix is None else prefix.allows_pads(total)
        size = batch_rows(self._batch_size, total)
        for batch in self._batches(lengths, pads, size):
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

    def sync(self, student: torch.nn.Module, version: int) -> None:
        """The weights are shared: only the version changes."""
        assert student is self._model, "this engine samples from the module that is trained"
        self._version = version

    def close(self) -> None:
        """Nothing is held."""

    def _batches(self, lengths: Sequence[int], pads: bool, size: int) -> Iterator[list[int]]:
        if pads:
            yield from batches_by_length(lengths, size)
            return
        for length in sorted(set(lengths)):
            same = [i for i, x in enumerate(lengths) if x == length]
            for start in range(0, len(same), size):
                yield same[start : start + size]

    def _generate_batch(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        streams: Tensor,  # (B,)
        prefix: SharedPrefix | None,
    ) -> list[list[int]]:
        lm = causal_lm(self._model)
        shared = len(prefix) if prefix is not None else 0
        pad, width = self._eos[0], max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad)  # (B, T): prefix, pads, the rest of the prompt
        mask = torch.zeros_like(ids)
        for row, kept, prompt in zip(ids, mask, prompts, strict=True):
            tokens = torch.tensor(prompt)
            row[:shared], row[width - len(prompt) + shared :] = tokens[:shared], tokens[shared:]
            kept[:shared], kept[width - len(prompt) + shared :] = 1, 1
        config = GenerationConfig(
            max_new_tokens=params.max_completion_tokens,
            do_sample=False,  # what is drawn is made the likeliest token
            eos_token_id=self._eos,
            pad_token_id=pad,
            use_cache=True,
        )
        draws = LogitsProcessorList()
        if params.temperature > 0:
            draws.append(_Draws(streams.to(lm.device), params.temperature, width))
        generate: Any = self._model.generate
        with _plain_generation_config(lm), _contiguous_head_input(lm):
            output = generate(
                input_ids=ids.to(lm.device),
                attention_mask=mask.to(lm.device),
                generation_config=config,
                logits_processor=draws,
                past_key_values=prefix.expand(len(prompts)) if prefix is not None else None,
            )
        return [self._until_eos(row) for row in output[:, ids.shape[1] :].tolist()]

    def _until_eos(self, token_ids: list[int]) -> list[int]:
        """Cut behind the first EOS: what follows are pads, which may be the same token."""
        for i, token in enumerate(token_ids):
            if token in self._eos:
                return token_ids[: i + 1]
        return token_ids


class _Draws(LogitsProcessor):
    """Draws the next token of each row, and leaves it as the likeliest one."""

    def __init__(self, streams: Tensor, temperature: float, width: int) -> None:
        self._streams = streams  # (B,)
        self._temperature = temperature
        self._width = width  # of the prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = uniforms(self._streams, input_ids.shape[1] - self._width)
        token = drawn(scores.float(), uniform, self._temperature)
        return scores.scatter_(1, token[:, None], torch.inf)  # a copy that generate made


@contextlib.contextmanager
def _contiguous_head_input(lm: torch.nn.Module) -> Iterator[None]:
    """The head is given the last position of padded rows, a strided slice, for which torch on a CPU
    copies the whole head once a row."""
    head = causal_lm(lm).get_output_embeddings()
    assert head is not None
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(), *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _plain_generation_config(lm: torch.nn.Module) -> Iterator[None]:
    """Hide the model's own generation defaults (top_k, penalties, ...): they would fill in every
    value that a call leaves open, and bend the distribution."""
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
