"""Keys and values of a token prefix that many sequences share, computed once."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from opcd.errors import InputError
from opcd.lm import causal_lm, transformer

# A pass reads every weight, which costs about as much as this many tokens in a batch.
MIN_TOKENS_SAVED = 128


class UnsupportedCacheError(InputError):
    """The architecture keeps no cache that can be handed out."""


class SharedPrefix:
    """The cache of one pass over `token_ids`; `expand` hands out copies that a pass may extend.

    The recorded states are never written to. They hold as long as the model's weights do. Where
    gradients are enabled they flow through the prefix as well.
    """

    def __init__(self, model: torch.nn.Module, token_ids: Sequence[int]) -> None:
        if not token_ids:
            raise InputError(
                "a shared prefix must hold at least one token, got none; the rendered prompts have "
                "no common start"
            )
        lm = causal_lm(model)
        self.token_ids = list(token_ids)
        ids = torch.tensor([self.token_ids], device=lm.device)
        body = transformer(model)
        output = body(input_ids=ids, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
            raise UnsupportedCacheError(
                f"{type(lm).__name__} must return a transformers Cache to share a prefix, got "
                f"{type(cache).__name__}"
            )
        self._cache: Any = cache
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def differentiable(self) -> bool:
        """Whether `expand` keeps the graph: views do, copies of recurrent states do not."""
        return all(map(_is_attention, self._cache.layers))

    def allows_pads(self, total_length: int) -> bool:
        """Whether masked pads between prefix and prompt leave a pass of that length exact.

        They would enter a recurrent state, and where the model counts cache slots instead of
        positions (a sliding window, ALiBi) they would move the prefix away.
        """
        return self._takes_positions and all(
            type(layer) is DynamicLayer
            or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= total_length)
            for layer in self._cache.layers
        )

    def expand(self, batch_size: int) -> Cache:
        """A cache of `batch_size` rows that starts with the prefix.

        Attention layers are views of the recorded row: the one copy is made when new keys are
        appended. Recurrent states are updated in place by the models, so they are copied.
        """
        cache = copy.copy(self._cache)
        cache.layers = [_expand(layer, batch_size) for layer in self._cache.layers]
        return cache


def common_prefix(model: torch.nn.Module, prompts: Sequence[Sequence[int]]) -> SharedPrefix | None:
    """What all prompts start with, where computing it once is worth a pass of its own."""
    length = shared_prefix_length(prompts)
    if length == 0 or length * (len(prompts) - 1) < MIN_TOKENS_SAVED:
        return None
    prefix = SharedPrefix(model, prompts[0][:length])
    return prefix if prefix.differentiable or not torch.is_grad_enabled() else None


def shared_prefix_length(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest common token prefix that leaves each sequence at least one token."""
    if not sequences:
        return 0
    ordered = sorted(map(list, sequences))
    low, high = ordered[0], ordered[-1]
    limit = min(map(len, sequences)) - 1
    length = 0
    while length < limit and low[length] == high[length]:
        length += 1
    return length


def _is_attention(layer: Any) -> bool:
    return type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)


def _expand(layer: Any, batch_size: int) -> Any:
    if not _is_attention(layer):
        layer = copy.deepcopy(layer)
        layer.reorder_cache(torch.zeros(batch_size, dtype=torch.long))
        return layer
    layer = copy.copy(layer)
    if layer.is_initialized:
        layer.keys = layer.keys.expand(batch_size, -1, -1, -1)
        layer.values = layer.values.expand(batch_size, -1, -1, -1)
    return layer
