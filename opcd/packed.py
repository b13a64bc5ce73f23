"""One packed row of sequences behind a shared prefix, through any model's own layers.

transformers looks its attention up by name on every call. For the length of a pass the name is
ours: `AttentionInterface` has a function under it, `AttentionMaskInterface` has none, so that the
model builds no mask. The pass travels to the function as a keyword that the layers hand on.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from opcd.attention import Operands, Packing, Shape, choose_backend, prefix_attention
from opcd.lm import causal_lm, transformer
from opcd.prefix import SharedPrefix, UnsupportedModelError

NAME = "opcd_packed"
_SWITCH = threading.RLock()  # one thread at a time switches a model's attention


class _Pass:
    """What every layer of one pass needs, and what the layers did."""

    def __init__(self, packing: Packing, prefix: SharedPrefix | None) -> None:
        self.packing = packing
        self.prefix = prefix
        self.backends: dict[int, str] = {}  # by layer


def packed_pass(
    model: torch.nn.Module,
    input_ids: Tensor,  # (1, N), sequences one after another, the longest first
    packing: Packing,
    prefix: SharedPrefix | None,
) -> tuple[Tensor, set[str]]:  # (1, N, D), and the names of the attention backends used
    """The last hidden states of every token, each sequence as if alone behind the prefix.

    Raises UnsupportedModelError if the model does not attend through `AttentionInterface`, or asks
    for something that packed attention does not know.
    """
    start = len(prefix) if prefix is not None else 0
    this = _Pass(packing, prefix)
    with _SWITCH, _attention_of(model, NAME):
        output = transformer(model)(
            input_ids=input_ids,
            position_ids=(packing.offsets + start)[None],
            use_cache=False,
            packed_pass=this,
        )
    layers = prefix.attention_layers if prefix is not None else set(this.backends)
    if not layers or set(this.backends) != layers:
        raise UnsupportedModelError(
            f"every attention layer of {type(causal_lm(model)).__name__} must go through "
            f"transformers' AttentionInterface to be packed, got {len(this.backends)} of "
            f"{len(layers)}"
        )
    return output.last_hidden_state, set(this.backends.values())


def packing_backends(model: torch.nn.Module, prefix: SharedPrefix) -> str:
    """What computes the attention of packed rows on this model, found by a short pass.

    Raises UnsupportedModelError if sequences in one row would not stay apart.
    """
    lm = causal_lm(model)
    name = type(lm).__name__
    if not prefix.only_attention:
        raise UnsupportedModelError(
            f"{name} must consist of attention alone to be packed, but has recurrent layers, whose "
            f"state would pass from one sequence of a row to the next"
        )
    if not getattr(lm, "_supports_attention_backend", False):
        raise UnsupportedModelError(
            f"{name} must attend through transformers' AttentionInterface to be packed, but "
            f"brings an attention of its own"
        )
    ids = torch.tensor([prefix.token_ids[:8]], device=lm.device)
    _, backends = packed_pass(model, ids, Packing([ids.shape[1]], lm.device), prefix)
    return " and ".join(sorted(backends))


@contextlib.contextmanager
def _attention_of(model: torch.nn.Module, name: str) -> Iterator[None]:
    """Attend by `name` inside; what was set before comes back, also after an exception."""
    configs = {id(c): c for m in causal_lm(model).modules() if (c := getattr(m, "config", None))}
    before = [(c, c._attn_implementation) for c in configs.values() if _has_attention(c)]
    try:
        for config, _ in before:
            config._attn_implementation = name
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
    packed_pass: _Pass | None = None,
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
    packing, prefix = packed_pass.packing, packed_pass.prefix
    new = [x[0].transpose(0, 1) for x in (query, key, value)]
    if prefix is not None:
        kept = prefix.keys_values(layer, query.dtype)
    else:
        kept = (key[0, :, :0], value[0, :, :0])
    operands = Operands(new[0], new[1], new[2], *kept)
    _check_layer(module, operands, prefix, layer, sliding_window)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    shape = Shape(scale, sliding_window, softcap, s_aux)
    shape = shape.within(kept[0].shape[1] + packing.longest)
    backend = choose_backend(operands, shape)
    with torch.autocast(device, enabled=False):  # or scores and merge would be rounded
        out = prefix_attention(operands, packing, shape, backend)
    packed_pass.backends[layer] = backend
    return out[None], None


def _check_layer(
    module: torch.nn.Module,
    operands: Operands,
    prefix: SharedPrefix | None,
    layer: int,
    sliding_window: int | None,
) -> None:
    """Raise UnsupportedModelError where what the layer says and what it recorded do not fit."""
    if prefix is None:
        return
    if (recorded := prefix.window(layer)) != sliding_window:
        raise UnsupportedModelError(
            f"{type(module).__name__} must tell its attention the window of {recorded} positions "
            f"to be packed, got {sliding_window}: it is in the mask alone"
        )
    ours = [(x.shape[1], x.shape[2]) for x in (operands.key, operands.value)]
    theirs = [(x.shape[0], x.shape[2]) for x in (operands.prefix_key, operands.prefix_value)]
    if ours != theirs:
        raise UnsupportedModelError(
            f"{type(module).__name__} must cache the keys and values that it attends to, to be "
            f"packed, got (heads, width) {theirs} in the cache and {ours} in the pass"
        )


AttentionInterface.register(NAME, _attend)
