"""What sampling takes: keys and values of a batch at their full length, and the largest step."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from opcd.config import TrainConfig
from opcd.models.lm import cache_argument, causal_lm, last_logits
from opcd.passes.prefix import (
    SharedPrefix,
    common_prefix,
    tokens_that_pay,
    worthwhile_prefix,
)
from opcd.preflight.weightless import Tally
from opcd.rollouts.generate import batch_rows
from opcd.rollouts.noise import drawn, truncated
from opcd.rollouts.protocol import SamplingParams


class Sampling(NamedTuple):
    """Bytes beyond the model's."""

    cache: int  # keys and values of all rows, and other states
    peak: int


def sampling(
    model: torch.nn.Module,  # without numbers
    prompts: Sequence[Sequence[int]],  # of one call of an engine
    config: TrainConfig,
    params: SamplingParams,  # of that call
    share_prefix: bool,
    run: Callable[[Callable[[], Any]], Any],  # a pass, in the arithmetic of the engine
) -> Sampling:
    """Of the largest batch: its prompts' pass, and the last step of its completions."""
    lm = causal_lm(model)
    total = max(map(len, prompts)) + params.max_completion_tokens
    rows = min(len(prompts), batch_rows(config.rollout_batch_size, total))
    batch = sorted(prompts, key=len, reverse=True)
    pays = tokens_that_pay(lm.device.type, grad=False, in_row=False)
    new = len(batch[0]) - (worthwhile_prefix(prompts, pays) if share_prefix else 0)
    rows = min(rows, max(1, config.max_tokens_per_pass // new))
    batch = batch[:rows]

    def prefill() -> Any:
        prefix = common_prefix(model, prompts) if share_prefix else None
        if prefix is not None and not prefix.only_attention:
            prefix = None  # copies of other states cannot be made without numbers: in full
        start, width = len(prefix) if prefix is not None else 0, len(batch[0])
        mask = torch.ones(rows, width, dtype=torch.long, device=lm.device)
        for line, prompt in zip(mask, batch, strict=True):
            line[start : start + width - len(prompt)] = 0
        return lm(
            input_ids=torch.zeros(rows, width - start, dtype=torch.long, device=lm.device),
            attention_mask=mask,
            use_cache=True,
            **cache_argument(lm, prefix.expand(rows) if prefix is not None else None),
            **last_logits(lm),
        )

    def draw() -> torch.Tensor:
        scores = out.logits[:, -1].float()
        head = scores
        if params.truncates:
            head = truncated(scores, params.temperature, params.top_k, params.top_p)
        uniform = torch.rand(rows, device=lm.device).double()
        token = drawn(head, uniform, params.temperature or 1.0)
        return scores.scatter(1, token[:, None], torch.inf)

    with torch.no_grad(), Tally() as first:
        out = run(prefill)
    with torch.no_grad(), Tally() as last:
        draw()
    layers = [_layer_bytes(layer, total) for layer in _layers(out)]
    cache = sum(layers)
    # A step copies the keys and values of one layer after the other.
    return Sampling(cache, max(first.peak, cache + max(layers, default=0) + last.peak))


def prefix_bytes(prefix: SharedPrefix, tokens: int) -> int:
    """What a prefix of so many tokens keeps, by a recorded one."""
    return prefix.nbytes * tokens // len(prefix)


def _layers(holder: Any) -> list[Any]:
    """Those of a cache, or of the cache of a model's output under any of its names."""
    for name in ("cache", "past_key_values", "cache_params"):
        holder = getattr(holder, name, holder)
    return list(getattr(holder, "layers", []))


def _layer_bytes(layer: Any, tokens: int) -> int:
    """Of a cache's layer that holds so many tokens of each row, or what its window shows."""
    found = 0
    for name, value in vars(layer).items():
        for tensor in (x for x in tree_leaves(value) if isinstance(x, torch.Tensor)):
            found += tensor.nbytes
            if name in ("keys", "values"):
                seen = min(tokens, (getattr(layer, "sliding_window", None) or tokens + 1) - 1)
                found += tensor.nbytes * seen // max(1, tensor.shape[-2]) - tensor.nbytes
    return found
