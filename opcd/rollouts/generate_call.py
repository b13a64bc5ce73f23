"""One call of `transformers.generate` that samples the model's own distribution."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import Cache

from opcd.models.lm import cache_argument, causal_lm
from opcd.models.sdpa import without_cudnn_attention
from opcd.rollouts.noise import drawn, uniforms
from opcd.rollouts.protocol import SamplingParams


def until_eos(token_ids: list[int], eos: Sequence[int]) -> list[int]:
    """Cut behind the first EOS: what follows are pads, which may be the same token."""
    for i, token in enumerate(token_ids):
        if token in eos:
            return token_ids[: i + 1]
    return token_ids


def generated(
    model: torch.nn.Module,
    ids: Tensor,  # (B, T): what the cache holds of each row, and what is new
    mask: Tensor,  # (B, T): 0 at pads
    cache: Cache | None,
    eos: Sequence[int],
    params: SamplingParams,
    streams: Tensor,  # (B,)
) -> Any:
    """What `transformers.generate` returns, with its sequences and its cache."""
    lm: Any = causal_lm(model)
    config = GenerationConfig(
        max_new_tokens=params.max_completion_tokens,
        do_sample=False,  # what is drawn is made the likeliest token
        eos_token_id=list(eos),
        pad_token_id=eos[0],
        use_cache=True,
        return_dict_in_generate=True,
    )
    draws = LogitsProcessorList()
    if params.temperature > 0:
        draws.append(_Draws(streams.to(lm.device), params.temperature, ids.shape[1]))
    generate: Any = model.generate
    with _plain_generation_config(lm), _contiguous_head_input(lm), without_cudnn_attention():
        return generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            generation_config=config,
            logits_processor=draws,
            **cache_argument(lm, cache),
        )


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
