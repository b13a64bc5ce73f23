"""One call of `transformers.generate` that samples the model's own distribution, or its head."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import Cache

from opcd.models.lm import cache_argument, causal_lm
from opcd.models.sdpa import without_cudnn_attention
from opcd.passes.prefix import SharedPrefix, UnsupportedModelError
from opcd.rollouts.noise import drawn, truncated, uniforms
from opcd.rollouts.protocol import SamplingParams
from opcd.rollouts.stops import StopStrings


def allows_gaps(model: torch.nn.Module, prompt: Sequence[int], prefix: SharedPrefix | None) -> bool:
    """Whether masked pads between a row's tokens leave its passes exact, however long it grows."""
    try:
        prefix = prefix or SharedPrefix(model, prompt[:1])
    except UnsupportedModelError:
        return False
    return prefix.allows_pads(2**31)


def generated(
    model: torch.nn.Module,
    ids: Tensor,  # (B, T): what the cache holds of each row, and what is new
    mask: Tensor,  # (B, T): 0 at pads
    cache: Cache | None,
    eos: Sequence[int],
    params: SamplingParams,
    streams: Tensor,  # (B,)
    logits: bool = False,
) -> Any:
    """What `transformers.generate` returns, with its sequences and its cache; on demand with the
    logits of each new token."""
    lm: Any = causal_lm(model)
    config = GenerationConfig(
        max_new_tokens=params.max_completion_tokens,
        do_sample=False,  # what is drawn is made the likeliest token
        eos_token_id=list(eos),
        pad_token_id=eos[0],
        use_cache=True,
        return_dict_in_generate=True,
        output_logits=logits,
    )
    draws, ends = LogitsProcessorList(), StoppingCriteriaList()
    if params.temperature > 0:
        draws.append(_Draws(streams.to(lm.device), params, ids.shape[1]))
    if params.stop is not None:
        ends.append(_Stops(params.stop, ids.shape[1]))
    generate: Any = model.generate
    with _plain_generation_config(lm), _contiguous_head_input(lm), without_cudnn_attention():
        return generate(
            input_ids=ids.to(lm.device),
            attention_mask=mask.to(lm.device),
            generation_config=config,
            logits_processor=draws,
            stopping_criteria=ends,
            **cache_argument(lm, cache),
        )


class _Draws(LogitsProcessor):
    """Draws the next token of each row, and leaves it as the likeliest one."""

    def __init__(self, streams: Tensor, params: SamplingParams, width: int) -> None:
        self._streams = streams  # (B,)
        self._params = params
        self._width = width  # of the prompts

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniform = uniforms(self._streams, input_ids.shape[1] - self._width)
        logits, params = scores.float(), self._params
        if params.truncates:
            logits = truncated(logits, params.temperature, params.top_k, params.top_p)
        token = drawn(logits, uniform, params.temperature)
        return scores.scatter_(1, token[:, None], torch.inf)  # a copy that generate made


class _Stops(StoppingCriteria):
    """Which rows have come to a stop string."""

    def __init__(self, stop: StopStrings, width: int) -> None:
        self._stop = stop
        self._width = width

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:  # (B,), bool
        rows = input_ids[:, self._width :].tolist()
        return torch.tensor([*map(self._stop.reached, rows)], device=input_ids.device)


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
