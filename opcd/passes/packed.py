"""Tokens of many sequences in one packed row, through any model's own layers.

transformers looks its attention up by name on every call. For the length of a pass the name is
ours: `AttentionInterface` has a function under it, `AttentionMaskInterface` has none, so that the
model builds no mask. The pass travels to the function as a keyword that the layers hand on, and
knows what a token attends: its own sequence behind a shared prefix here, what a static cache holds
in `decode.py`.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from opcd.models.lm import causal_lm, max_positions, transformer
from opcd.models.sdpa import without_cudnn_attention
from opcd.passes.attention import Operands, Shape, prefix_attention
from opcd.passes.backends import Kind, choose_backend
from opcd.passes.packing import Packing
from opcd.passes.prefix import SharedPrefix, UnsupportedModelError

NAME = "opcd_packed"
_SWITCH = threading.RLock()  # one thread at a time switches a model's attention


Store = Callable[[int, Tensor, Tensor], None]  # layer, key (N, H_kv, D), value (N, H_kv, D_v)


class PackedPass(Protocol):
    """What every layer of one pass needs: handed to the model as the keyword `packed_pass`."""

    def attend(
        self,
        layer: int,
        query: Tensor,  # (N, H, D)
        key: Tensor,  # (N, H_kv, D)
        value: Tensor,  # (N, H_kv, D_v)
        shape: Shape,
    ) -> Tensor:  # (N, H, D_v)
        """The attention of one layer."""
        ...


class InRow(NamedTuple):
    """A prefix that stands in the packed row itself, as the one sequence of a group."""

    group: int
    length: int

    def __len__(self) -> int:
        return self.length


class Kept(Protocol):
    """Keys and values of tokens that were computed before, kept elsewhere."""

    def __len__(self) -> int: ...

    def keys_values(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(H_kv, S, D) and (H_kv, S, D_v)."""
        ...


Behind = SharedPrefix | InRow | Kept | None  # what the sequences of a group stand behind


class _SequencesPass:
    """Whole sequences, each group of them behind a prefix of its own."""

    def __init__(self, packing: Packing, prefixes: Sequence[Behind], store: Store | None) -> None:
        self._packing = packing
        self._prefixes = prefixes
        self._store = store
        self.kinds: dict[int, Kind] = {}  # by layer

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, shape: Shape) -> Tensor:
        kept = []
        for prefix in self._prefixes:
            if prefix is None or isinstance(prefix, InRow):
                of = slice(0) if prefix is None else self._packing.groups[prefix.group]
                kept.append((key[of].transpose(0, 1), value[of].transpose(0, 1)))
            else:
                kept.append(prefix.keys_values(layer, query.dtype))
        keys, values = zip(*kept, strict=True)
        operands = Operands(query, key, value, keys, values)
        for prefix, states in zip(self._prefixes, kept, strict=True):
            if isinstance(prefix, SharedPrefix):
                _check_layer(operands, prefix, states, layer, shape.window)
        shape = shape.within(max(operands.prefix_lengths) + self._packing.longest)
        kind = self.kinds[layer] = Kind.of(operands, shape)
        if self._store is not None:
            self._store(layer, key, value)
        return prefix_attention(operands, self._packing, shape, choose_backend(kind))


@torch.compiler.disable
def packed_pass(
    model: torch.nn.Module,
    input_ids: Tensor,  # (1, N), sequences one after another, as `packing` has them
    packing: Packing,
    prefixes: Sequence[Behind],  # one for each group of `packing`
    store: Store | None = None,
) -> tuple[Tensor, set[Kind]]:  # (1, N, D), and the kinds of attention in it
    """The last hidden states of every token, each sequence as if alone behind its prefix.

    `store` is given each layer's keys and values of these tokens, without those of prefixes.

    Raises UnsupportedModelError if the model does not attend through `AttentionInterface`, or asks
    for something that packed attention does not know. A compiled body runs uncompiled: attention is
    Python here, and every packing would be compiled anew.
    """
    first = [0 if prefix is None else len(prefix) for prefix in prefixes]
    this = _SequencesPass(packing, prefixes, store)
    with packed_attention(model), torch.compiler.set_stance("force_eager"):
        output = transformer(model)(
            input_ids=input_ids,
            position_ids=packing.positions(first)[None],
            use_cache=False,
            packed_pass=this,
        )
    recorded = next((prefix for prefix in prefixes if isinstance(prefix, SharedPrefix)), None)
    layers = recorded.attention_layers if recorded is not None else set(this.kinds)
    if not layers or set(this.kinds) != layers:
        raise UnsupportedModelError(
            f"every attention layer of {type(causal_lm(model)).__name__} must go through "
            f"transformers' AttentionInterface to be packed, got {len(this.kinds)} of "
            f"{len(layers)}"
        )
    return output.last_hidden_state, set(this.kinds.values())


class Backends(NamedTuple):
    """What computes the attention of packed rows on a model."""

    forward: str
    with_gradients: str


def packing_backends(model: torch.nn.Module, prefix: SharedPrefix) -> Backends:
    """What computes the attention of packed rows on this model, found by a short pass.

    Raises UnsupportedModelError if sequences in one row would not stay apart.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    if not prefix.only_attention:
        raise UnsupportedModelError(
            f"{name} must cache keys and values alone to be packed, but keeps other states "
            f"({', '.join(prefix.other_layers)}), which would pass from one sequence of a row to "
            f"the next"
        )
    if not getattr(lm, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} must attend through transformers' AttentionInterface to be packed, but "
            f"brings an attention of its own"
        )
    room = (max_positions(lm.config) or 2**31) - len(prefix)
    ids = torch.tensor([prefix.token_ids[: min(8, room)]], device=lm.device)
    _, kinds = packed_pass(model, ids, Packing([[ids.shape[1]]], lm.device), [prefix])
    # A window that hides nothing of so few tokens will hide some in a step's passes, of which the
    # gradient has no fused kernel there.
    windows = any(prefix.window(layer) for layer in prefix.attention_layers)
    hides = lm.device.type == "cuda" and windows
    trained = {kind._replace(grad=True, window=kind.window or hides) for kind in kinds}
    return Backends(
        *(" and ".join(sorted(set(map(choose_backend, some)))) for some in (kinds, trained))
    )


@contextlib.contextmanager
def packed_attention(model: torch.nn.Module) -> Iterator[None]:
    """Calls of the model inside take a `packed_pass`, which attends for its layers.

    What was set before comes back, also after an exception.
    """
    with _SWITCH:
        modules = causal_lm(model).modules()
        configs = {id(c): c for m in modules if (c := getattr(m, "config", None))}
        before = [(c, c._attn_implementation) for c in configs.values() if _has_attention(c)]
        try:
            for config, _ in before:
                config._attn_implementation = NAME
            with without_cudnn_attention():
                yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


def _has_attention(config: Any) -> bool:
    return hasattr(config, "_attn_implementation")


def _attend(
    module: torch.nn.Module,
    query: Tensor,  # (1, H, N, D)
    key: Tensor,  # (1, H_kv, N, D)
    value: Tensor,  # (1, H_kv, N, D_v)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed_pass: PackedPass | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (1, N, H, D_v)
    """Called by each attention layer, as transformers' own attention functions are."""
    asked = {k for k in ("position_bias", "cache") if options.get(k) is not None}
    asked |= {"dropout"} if options.get("dropout") else set()
    asked |= {"attention_mask"} if attention_mask is not None else set()
    layer = getattr(module, "layer_idx", None)
    if packed_pass is None or layer is None or asked or not getattr(module, "is_causal", True):
        raise UnsupportedModelError(
            f"{type(module).__name__} must hand its keywords on and be plain causal attention to "
            f"be packed, got {sorted(asked) or 'no pass, no layer number, or is_causal=False'}"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    shape = Shape(scale, sliding_window, softcap, s_aux)
    new = [x[0].transpose(0, 1) for x in (query, key, value)]
    with torch.autocast(device, enabled=False):  # or scores and merge would be rounded
        out = packed_pass.attend(layer, new[0], new[1], new[2], shape)
    return out[None].contiguous(), None  # some models view it


def _check_layer(
    operands: Operands,
    prefix: SharedPrefix,
    states: tuple[Tensor, Tensor],
    layer: int,
    sliding_window: int | None,
) -> None:
    """Raise UnsupportedModelError where what the layer says and what it recorded do not fit."""
    if (recorded := prefix.window(layer)) != sliding_window:
        raise UnsupportedModelError(
            f"layer {layer} must tell its attention the window of {recorded} positions "
            f"to be packed, got {sliding_window}: it is in the mask alone"
        )
    ours = [(x.shape[1], x.shape[2]) for x in (operands.key, operands.value)]
    theirs = [(x.shape[0], x.shape[2]) for x in states]
    if ours != theirs:
        raise UnsupportedModelError(
            f"layer {layer} must cache the keys and values that it attends to, to be "
            f"packed, got (heads, width) {theirs} in the cache and {ours} in the pass"
        )


AttentionInterface.register(NAME, _attend)
