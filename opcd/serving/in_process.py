"""Reading prompts and decoding with transformers, where no server is installed: one request at a
time, none of a server's scheduling. What it shows is what the prompt costs a model, no more.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache

from opcd.models.lm import cache_argument, cache_of, causal_lm, last_logits
from opcd.runtime.stopwatch import Stopwatch
from opcd.serving.measure import Asking, Figures, Load
from opcd.serving.spread import Spread, quartiles

WARM = 2  # requests


@torch.inference_mode()
def measured_here(
    model: Any, prompts: Sequence[Sequence[int]], asking: Asking, prefix: Sequence[int] = ()
) -> Figures | None:
    """What a model takes for prompts, one after the other.

    prompts: token ids, without the prefix.
    prefix: token ids whose keys and values are computed once and not timed, as a server's prefix
        cache has them; None is returned where the model's cache cannot be cut back to it.
    """
    lm = causal_lm(model)
    cache: Cache | None = None
    if prefix:
        cache = DynamicCache(config=lm.config)
        _read(lm, prefix, cache)
        if not _cuts(cache, len(prefix)):
            return None
    count = min(asking.alone, len(prompts))
    firsts: list[float] = []
    each: list[float] = []
    totals: list[float] = []
    began = time.monotonic()
    for i, ids in enumerate([*prompts[:WARM], *prompts[:count]]):
        if firsts and time.monotonic() - began > asking.seconds:
            break
        # Of a prefix there is one cache, cut back behind each request.
        used = cache if cache is not None else DynamicCache(config=lm.config)
        first, more = _request(lm, ids, used, asking.answer_tokens)
        if cache is not None:
            cache.crop(len(prefix) - cache.get_seq_length())  # below 0: so many are removed
        if i >= WARM:
            firsts.append(first)
            each += more
            totals.append(first + sum(more))
    spread = quartiles(totals)
    rate = Spread(1 / spread.median, 1 / spread.high, 1 / spread.low, spread.n)
    return Figures(
        quartiles(firsts),
        quartiles(each) if each else None,
        len(prefix) + median(map(len, prompts[:count])),
        float(len(prefix)),
        asking.answer_tokens,
        [Load(1, rate, len(firsts))],
    )


def _request(
    lm: Any, ids: Sequence[int], cache: Cache, answer_tokens: int
) -> tuple[float, list[float]]:
    """Seconds to the first token, and for each behind it."""
    watch = Stopwatch(lm.device)
    watch.mark()
    token = _read(lm, ids, cache)
    watch.mark()
    for _ in range(answer_tokens - 1):
        token = _read(lm, token[None], cache)
        watch.mark()
    first, *each = watch.laps()
    return first, each


def _read(lm: Any, ids: Any, cache: Cache) -> torch.Tensor:  # ()
    """Tokens behind those that the cache holds; the likeliest one that follows."""
    row = torch.as_tensor(ids, device=lm.device)[None]  # (1, T)
    output = lm(input_ids=row, use_cache=True, **cache_argument(lm, cache), **last_logits(lm))
    assert cache_of(output) is cache, "a model keeps the cache that it is given"
    return output.logits[0, -1].argmax()


def _cuts(cache: Cache, length: int) -> bool:
    """Whether a cache that has read so many tokens holds them all, so that it can be cut back."""
    return bool(cache.layers) and all(
        type(layer).__name__ == "DynamicLayer" and layer.get_seq_length() == length
        for layer in cache.layers
    )
