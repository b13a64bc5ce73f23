"""Attention of packed sequences that share a prefix, merged from two parts by their log-sum-exps.

Each query attends (i) the whole prefix of its group, which no sequence holds a copy of, and (ii)
its own sequence up to itself. Either part is a softmax attention of its own with a log-sum-exp lse;
the attention over both is

    w = sigmoid(lse_own − lse_prefix),   out = out_prefix + w (out_own − out_prefix)     in fp32

Fused kernels for it stand in `flash.py`; which one a layer takes, in `backends.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opcd.passes.flash import KERNELS, Part, fused_attention, merged
from opcd.passes.packing import Packing

PLAIN_SCORES_BYTES = 64 * 2**20  # of the fp32 scores that plain PyTorch holds at a time


class Shape(NamedTuple):
    """What is computed besides softmax(scale · q kᵀ) v."""

    scale: float
    window: int | None = None  # a query sees this many positions, itself included
    softcap: float | None = None  # scores become softcap · tanh(score / softcap)
    sinks: Tensor | None = None  # (H,): a score per head that takes probability and gives nothing

    def within(self, total_length: int) -> "Shape":
        """The same for sequences of at most `total_length`: a window that hides nothing is none."""
        wide = self.window is not None and total_length <= self.window
        return self._replace(window=None) if wide else self


class Operands(NamedTuple):
    """What is attended by what."""

    query: Tensor  # (N, H, D), packed
    key: Tensor  # (N, H_kv, D)
    value: Tensor  # (N, H_kv, D_v)
    # Of each group: its prefix's last S tokens; S may be 0, and another for every group.
    prefix_keys: tuple[Tensor, ...]  # (H_kv, S, D)
    prefix_values: tuple[Tensor, ...]  # (H_kv, S, D_v)

    @property
    def prefix_lengths(self) -> list[int]:
        """S of each group."""
        return [x.shape[1] for x in self.prefix_keys]

    @property
    def requires_grad(self) -> bool:
        """Whether any of them takes a gradient."""
        tensors = (self.query, self.key, self.value, *self.prefix_keys, *self.prefix_values)
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def prefix_attention(
    operands: Operands,
    packing: Packing,
    shape: Shape,
    backend: str,  # as `backends.choose_backend` names it
) -> Tensor:  # (N, H, D_v)
    """Attention of each token to its group's prefix and to its own sequence up to itself.

    Equals full attention over prefix + sequence for each sequence alone. With a window the S kept
    tokens must hold every position that it shows.
    Numerics: scores and log-sum-exps in fp32, the merge in fp32, the result in the query's dtype.
    """
    if backend == "triton":
        from opcd_kernels.prefix_attention import prefix_attention_triton  # needs Triton

        prefix_key, prefix_value = map(_in_one_row, operands[3:])
        bounds = packing.prefix_bounds(operands.prefix_lengths)
        own = operands.query, operands.key, operands.value
        where = bounds, packing.cu_seqlens, packing.longest
        options = shape._asdict()
        return prefix_attention_triton(*own, prefix_key, prefix_value, *where, **options)
    if backend == "plain":
        out, lse = _plain(operands, packing, shape)
    else:
        prefixes = (*operands.prefix_keys, *operands.prefix_values)
        out, lse = fused_attention(KERNELS[backend], packing, shape.scale, *operands[:3], prefixes)
    if shape.sinks is not None:
        out = out * torch.sigmoid(lse - shape.sinks.float())[..., None]
    return out.to(operands.query.dtype)


def _in_one_row(prefixes: Sequence[Tensor]) -> Tensor:
    """(H_kv, S, D) of each group → (H_kv, Σ S, D)."""
    return prefixes[0] if len(prefixes) == 1 else torch.cat([*prefixes], 1)


def cached_attention(
    query: Tensor,  # (B, H, D): one token of each row
    keys: Tensor,  # (B, H_kv, T, D); the last slot of a row holds zeros
    values: Tensor,  # (B, H_kv, T, D_v); likewise
    visible: Tensor,  # (B, T), bool: what the token sees, its window regarded; never the last slot
    shape: Shape,
) -> Tensor:  # (B, H, D_v)
    """Attention of one token a row to the keys and values that are kept of its row.

    A sink is a score that gives no value: the last slot, with the sink in its mask.
    Numerics: as `prefix_attention`; a sink is rounded to the query's dtype.
    """
    if shape.softcap is None:
        # Heads that share a key become queries of it: no key is copied for them.
        heads = query.unflatten(1, (keys.shape[1], -1))  # (B, H_kv, G, D)
        mask = visible[:, None, None]
        if shape.sinks is not None:
            mask = _with_sinks(mask, shape.sinks.to(query.dtype).view(*heads.shape[1:3]))
        out = scaled_dot_product_attention(heads, keys, values, mask, scale=shape.scale)
        return out.flatten(1, 2)
    out, lse = _softmax(query[:, :, None], keys, values, visible[:, None, None, None], shape)
    if shape.sinks is not None:
        out = out * torch.sigmoid(lse - shape.sinks.float()[:, None])[..., None]
    return out[:, :, 0].to(query.dtype)


def _with_sinks(visible: Tensor, sinks: Tensor) -> Tensor:
    """(B, 1, 1, T) and (H_kv, G) → what is added to scores (B, H_kv, G, T): in the last slot the
    sink."""
    b, *_, t = visible.shape
    added = sinks.new_zeros(b, *sinks.shape, t).masked_fill(~visible, float("-inf"))
    added[..., -1] = sinks
    return added


# ---- plain PyTorch: windows, softcaps, any head width, gradients everywhere ----


def _plain(operands: Operands, packing: Packing, shape: Shape) -> tuple[Tensor, Tensor]:
    query, key, value, prefix_keys, prefix_values = operands
    outs, lses = [], []
    for block in packing.blocks:
        q, k, v = (block.spread(x) for x in (query, key, value))
        place = torch.arange(block.width, device=q.device)
        distance = place[:, None] - place  # (T, T)
        visible = distance >= 0
        if shape.window is not None:
            visible = visible & (distance < shape.window)
        out, lse = _softmax(q, k, v, visible, shape)
        outs.append(block.gather(out))
        lses.append(block.gather(lse[..., None])[..., 0])
    out, lse = packing.joined(outs), packing.joined(lses)
    if not any(operands.prefix_lengths):
        return out, lse
    outs, lses = [], []
    groups = zip(packing.groups, prefix_keys, prefix_values, strict=True)
    for group, prefix_key, prefix_value in groups:
        s = prefix_key.shape[1]
        step = max(1, PLAIN_SCORES_BYTES // (4 * query.shape[1] * max(1, s)))
        parts = zip(query[group].split(step), packing.offsets[group].split(step), strict=True)
        for q, offsets in parts:
            seen = None
            if shape.window is not None:
                distance = offsets[:, None] + s - torch.arange(s, device=q.device)
                seen = distance < shape.window
            rows = q.transpose(0, 1)[None]
            out_p, lse_p = _softmax(rows, prefix_key[None], prefix_value[None], seen, shape)
            outs.append(out_p[0].transpose(0, 1))
            lses.append(lse_p[0].T)
    return merged(Part(torch.cat(outs), torch.cat(lses)), Part(out, lse))


def _softmax(
    query: Tensor,  # (B, H, T, D)
    key: Tensor,  # (B, H_kv, S, D)
    value: Tensor,  # (B, H_kv, S, D_v)
    visible: Tensor | None,  # (T, S), or what broadcasts to (B, H_kv, G, T, S)
    shape: Shape,
) -> tuple[Tensor, Tensor]:  # (B, H, T, D_v) and (B, H, T); 0 and −inf where nothing is visible
    q = query.unflatten(1, (key.shape[1], -1)).float()  # (B, H_kv, G, T, D)
    scores = q @ key.float().mT[:, :, None] * shape.scale
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    lse = scores.logsumexp(-1, keepdim=True)
    out = torch.exp(scores - lse.clamp_min(torch.finfo(lse.dtype).min)) @ value.float()[:, :, None]
    return out.flatten(1, 2), lse[..., 0].flatten(1, 2)
