"""Keys and values of a token prefix that many sequences share, computed once."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from opcd.errors import InputError
from opcd.models.lm import cache_of, causal_lm, rope_differs, transformer
from opcd.models.sdpa import without_cudnn_attention
from opcd.runtime.upload import uploaded

# On a CPU a pass reads every weight, which costs about as much as this many tokens in a batch.
MIN_TOKENS_SAVED = 128
# On a GPU launches count, which no token saves: thirty layers have about 500 of them forward and
# 1,000 more backward, some 5 µs each, in which a model of a billion weights computes so many tokens
# (by arithmetic; no GPU has been measured).
GPU_TOKENS_SAVED = {"pass": 1024, "pass with gradients": 4096, "in a row": 512}


class UnsupportedModelError(InputError):
    """The architecture does not do what a faster pass needs of it."""


class SharedPrefix:
    """The cache of one pass over `token_ids`, for passes that continue behind it.

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
        ids = uploaded(torch.tensor([self.token_ids]), lm.device)
        body = transformer(model)
        with without_cudnn_attention():
            output = body(input_ids=ids, use_cache=True)
        cache = cache_of(output)
        if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
            raise UnsupportedModelError(
                f"{type(lm).__name__} must return a transformers Cache to share a prefix, got "
                f"{type(cache).__name__}"
            )
        beside = {name: value for name, value in vars(cache).items() if name != "layers"}
        if any(True for _ in _tensors(beside)):  # what passes would share, and change
            raise UnsupportedModelError(
                f"{type(lm).__name__} must keep all its states in the layers of its cache to share "
                f"a prefix, but has some beside them"
            )
        self._cache: Any = cache
        self._takes_positions = "position_ids" in inspect.signature(body.forward).parameters
        self._window = getattr(lm.config.get_text_config(), "window_size", None)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def nbytes(self) -> int:
        """Memory of the recorded states."""
        tensors = [t for layer in self._cache.layers for t in _tensors(vars(layer))]
        return sum(t.numel() * t.element_size() for t in tensors)

    @property
    def only_attention(self) -> bool:
        """Whether no layer keeps anything else, such as a recurrent state.

        One would leak between sequences in a packed row, and its copies do not keep the graph.
        """
        return all(map(_is_attention, self._cache.layers))

    @property
    def other_layers(self) -> list[str]:
        """Kinds of layers of the cache that hold something else."""
        return sorted({type(x).__name__ for x in self._cache.layers if not _is_attention(x)})

    @property
    def attention_layers(self) -> set[int]:
        """Numbers of the layers that have keys and values."""
        layers = enumerate(self._cache.layers)
        return {i for i, x in layers if _is_attention(x) and x.is_initialized}

    def keys_values(self, layer: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """(H_kv, S, D) and (H_kv, S, D_v) of the last S prefix tokens, all that the layer sees."""
        kept = self._cache.layers[layer]
        return kept.keys[0].to(dtype), kept.values[0].to(dtype)

    def window(self, layer: int) -> int | None:
        """The sliding window that the cache was told of for a layer; None for all positions."""
        return getattr(self._cache.layers[layer], "sliding_window", None)

    def allows_pads(self, total_length: int) -> bool:
        """Whether masked pads between prefix and prompt leave a pass of that length exact.

        They would enter a recurrent state, and where the model counts cache slots instead of
        positions (a sliding window, ALiBi) they would move the prefix away. GPT-Neo's cache knows
        nothing of the model's window.
        """
        within = self._window is None or self._window >= total_length
        return self._takes_positions and all(
            (type(layer) is DynamicLayer and within)
            or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window >= total_length)
            for layer in self._cache.layers
        )

    def expand(self, batch_size: int, passes: int | None = None) -> Cache:
        """A cache of `batch_size` rows that starts with the prefix.

        Attention layers are views of the recorded row. With `passes=1` the copy that a pass makes
        behind them lives as long as its layer does; otherwise the cache keeps it and grows.
        Recurrent states are updated in place by the models, so they are copied.
        """
        cache = copy.copy(self._cache)
        cache.layers = [_expand(layer, batch_size, passes == 1) for layer in self._cache.layers]
        return cache


def common_prefix(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    longest: int = 0,  # tokens that a pass behind it will have, where they are known
) -> SharedPrefix | None:
    """What all prompts start with, where computing it once is worth a pass of its own."""
    device, grad = causal_lm(model).device.type, torch.is_grad_enabled()
    length = worthwhile_prefix(prompts, tokens_that_pay(device, grad, in_row=False))
    if length == 0:
        return None
    if rope_differs(causal_lm(model).config, length, max(longest, max(map(len, prompts)) + 1)):
        return None
    prefix = SharedPrefix(model, prompts[0][:length])
    return prefix if prefix.only_attention or not torch.is_grad_enabled() else None


def tokens_that_pay(device_type: str, grad: bool, in_row: bool) -> int:
    """How many tokens a shared start must save to be worth computing apart.

    It costs a pass of its own, forward and, with gradients, backward; or (`in_row`) nothing but
    one more attention in each layer.
    """
    if device_type != "cuda":
        return MIN_TOKENS_SAVED
    return GPU_TOKENS_SAVED["in a row" if in_row else "pass with gradients" if grad else "pass"]


def worthwhile_prefix(prompts: Sequence[Sequence[int]], tokens: int) -> int:
    """Length of what all prompts start with, or 0 where that once saves fewer than `tokens`."""
    length = shared_prefix_length(prompts)
    return length if length * (len(prompts) - 1) >= tokens else 0


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


def empty_cache(model: torch.nn.Module) -> Cache | None:
    """A cache that holds nothing and keeps nothing; None for models that keep other states.

    Given positions and neither mask nor cache, transformers looks whether rows are packed, which
    holds the host until the GPU's queue is empty. With a cache it does not look.
    """
    cache = DynamicCache(config=causal_lm(model).config)
    return _KeepsNothing() if all(type(layer) in _ONCE for layer in cache.layers) else None


class _KeepsNothing(DynamicCache):
    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class _Once:
    """Attention layers of a cache for one pass: they hand out prefix and new, and keep neither."""

    keys: Tensor
    values: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return torch.cat([self.keys, keys], -2), torch.cat([self.values, values], -2)


class _OnceFull(_Once, DynamicLayer):
    pass


class _OnceSliding(_Once, DynamicSlidingWindowLayer):
    pass


_ONCE = {DynamicLayer: _OnceFull, DynamicSlidingWindowLayer: _OnceSliding}


def _is_attention(layer: Any) -> bool:
    return type(layer) in _ONCE


def _expand(layer: Any, batch_size: int, once: bool) -> Any:
    if not _is_attention(layer):
        layer = copy.deepcopy(layer)
        layer.reorder_cache(torch.zeros(batch_size, dtype=torch.long))
        return layer
    rows = copy.copy(layer)
    if layer.is_initialized:
        if once:
            rows = object.__new__(_ONCE[type(layer)])
            vars(rows).update(vars(layer))
        rows.keys = layer.keys.expand(batch_size, -1, -1, -1)
        rows.values = layer.values.expand(batch_size, -1, -1, -1)
    return rows


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in a layer's attributes."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
