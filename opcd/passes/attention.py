"""Attention of packed sequences that share a prefix, merged from two parts by their log-sum-exps.

Each query attends (i) the whole prefix of its group, which no sequence holds a copy of, and (ii)
its own sequence up to itself. Either part is a softmax attention of its own with a log-sum-exp lse;
the attention over both is

    w = sigmoid(lse_own − lse_prefix),   out = out_prefix + w (out_own − out_prefix)     in fp32

The backward of the fused CPU kernel takes the merged output and the merged lse for either part,
since its probabilities exp(score − lse) are then those of the whole softmax.
"""

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

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
    backend: str,  # as `choose_backend` names it
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
    if backend == "aten flash, cpu":
        prefixes = (*operands.prefix_keys, *operands.prefix_values)
        out, lse = _FlashCpu.apply(packing, shape.scale, *operands[:3], *prefixes)
    elif backend == "plain":
        out, lse = _plain(operands, packing, shape)
    else:
        out, lse = _flash_cuda(operands, packing, shape.scale, FLASH_CUDA[backend][1])
    if shape.sinks is not None:
        out = out * torch.sigmoid(lse - shape.sinks.float())[..., None]
    return out.to(operands.query.dtype)


def _in_one_row(prefixes: Sequence[Tensor]) -> Tensor:
    """(H_kv, S, D) of each group → (H_kv, Σ S, D)."""
    return prefixes[0] if len(prefixes) == 1 else torch.cat([*prefixes], 1)


def cached_attention(
    query: Tensor,  # (B, H, D): one token of each row
    keys: Tensor,  # (B, H_kv, T, D)
    values: Tensor,  # (B, H_kv, T, D_v)
    visible: Tensor,  # (B, T), bool: what the token sees, its window regarded
    shape: Shape,
) -> Tensor:  # (B, H, D_v)
    """Attention of one token a row to the keys and values that are kept of its row.

    Numerics: as `prefix_attention`.
    """
    if shape.softcap is None and shape.sinks is None:
        # Heads that share a key become queries of it: no key is copied for them.
        heads = query.unflatten(1, (keys.shape[1], -1))  # (B, H_kv, G, D)
        mask = visible[:, None, None]
        out = scaled_dot_product_attention(heads, keys, values, mask, scale=shape.scale)
        return out.flatten(1, 2)
    out, lse = _softmax(query[:, :, None], keys, values, visible[:, None, None, None], shape)
    if shape.sinks is not None:
        out = out * torch.sigmoid(lse - shape.sinks.float()[:, None])[..., None]
    return out[:, :, 0].to(query.dtype)


def choose_backend(operands: Operands, shape: Shape) -> str:
    """The fastest of what computes this: a name for `Plan.backend`."""
    query, value = operands.query, operands.value
    grad = operands.requires_grad
    dense = shape.window is None and shape.softcap is None
    width = query.shape[-1]
    if value.shape[-1] != width or (grad and shape.sinks is not None):
        return "plain"
    if query.device.type == "cpu":
        return "aten flash, cpu" if dense else "plain"
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.device.type != "cuda" or grad or not half or width > 256:
        return "plain"
    if dense:
        return next(name for name, (package, _) in FLASH_CUDA.items() if _is_installed(package))
    return "triton" if _is_installed("triton") else "plain"


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _merge(
    out_prefix: Tensor, lse_prefix: Tensor, out_own: Tensor, lse_own: Tensor
) -> tuple[Tensor, Tensor]:
    """(N, H, D) and (N, H) each; a prefix of which a query sees nothing has lse −inf, out 0."""
    weight = torch.sigmoid(lse_own - lse_prefix)[..., None]
    lse = torch.logaddexp(lse_own, lse_prefix)
    return torch.lerp(out_prefix.float(), out_own.float(), weight), lse


# ---- aten's fused kernel for the CPU ----


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(N, H, D) → (1, H_kv, G · N, D): heads that share a key become more queries of it."""
    n, heads, width = x.shape
    groups = x.view(n, kv_heads, heads // kv_heads, width)
    return groups.permute(1, 2, 0, 3).reshape(1, kv_heads, -1, width)


def _unfold(x: Tensor, n: int) -> Tensor:
    """(H_kv, G · N, ...) → (N, H, ...)."""
    return x.unflatten(1, (-1, n)).flatten(0, 1).transpose(0, 1)


class _FlashCpu(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        packing: Packing,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *prefixes: Tensor,  # the keys of each group, then the values of each
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        heads, kv_heads = query.shape[1], key.shape[1]
        outs, lses = [], []
        for block in packing.blocks:
            q, k, v = (block.spread(x) for x in (query, key, value))
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            out, lse = flash(q, k, v, 0.0, True, scale=scale)
            outs.append(block.gather(out))
            lses.append(block.gather(lse[..., None])[..., 0])
        out, lse = packing.joined(outs), packing.joined(lses)
        if any(x.shape[1] for x in prefixes):
            outs, lses = [], []
            for group, k, v in _by_group(packing, prefixes):
                q, n = _fold(query[group], kv_heads), group.stop - group.start
                if not k.shape[1]:
                    outs.append(query.new_zeros(n, *query.shape[1:]))
                    lses.append(lse.new_full((n, heads), -torch.inf))
                    continue
                out_p, lse_p = flash(q, k[None], v[None], 0.0, False, scale=scale)
                outs.append(_unfold(out_p[0], n))
                lses.append(_unfold(lse_p[0], n))
            out_p, lse_p = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
            out, lse = _merge(out_p, lse_p, out, lse)
            out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse, *prefixes)
        ctx.packing, ctx.scale = packing, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, out, lse, *prefixes = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        group_size = heads // kv_heads
        dtype = query.dtype
        # In fp32 whatever came in: more exact, and on short sequences several times faster.
        query, key, value, out, grad = (x.float() for x in (query, key, value, out, grad))
        prefixes = [x.float() for x in prefixes]
        parts: list[tuple[Tensor, ...]] = []
        for block in ctx.packing.blocks:
            q, k, v, o = (block.spread(x) for x in (query, key, value, out))
            k, v = (x.repeat_interleave(group_size, 1) for x in (k, v))
            do, m = block.spread(grad, pad=0.0), block.spread(lse[..., None])[..., 0]
            dq, dk, dv = flash(do, q, k, v, o, m, 0.0, True, scale=ctx.scale)
            dk, dv = (x.unflatten(1, (kv_heads, group_size)).sum(2) for x in (dk, dv))
            parts.append(tuple(block.gather(x) for x in (dq, dk, dv)))
        dq, dk, dv = (ctx.packing.joined(x) for x in zip(*parts, strict=True))
        prefix_grads: list[tuple[Tensor, Tensor]] = []
        if any(x.shape[1] for x in prefixes):
            parts_q = []
            for group, k, v in _by_group(ctx.packing, prefixes):
                if not k.shape[1]:
                    parts_q.append(torch.zeros_like(query[group]))
                    prefix_grads.append((torch.zeros_like(k), torch.zeros_like(v)))
                    continue
                q, o, do = (_fold(x[group], kv_heads) for x in (query, out, grad))
                m = _fold(lse[group][..., None], kv_heads)[..., 0]
                found = flash(do, q, k[None], v[None], o, m, 0.0, False, scale=ctx.scale)
                parts_q.append(_unfold(found[0][0], group.stop - group.start))
                prefix_grads.append((found[1][0], found[2][0]))
            dq = dq + (parts_q[0] if len(parts_q) == 1 else torch.cat(parts_q))
        dq, dk, dv = (x.to(dtype) for x in (dq, dk, dv))
        prefix_grads = [(a.to(dtype), b.to(dtype)) for a, b in prefix_grads]
        none = [None] * len(prefixes)
        of_prefixes = [*chain(*zip(*prefix_grads, strict=True))] if prefix_grads else none
        return None, None, dq, dk, dv, *of_prefixes


def _by_group(
    packing: Packing, prefixes: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens of each group, and the keys and values of its prefix."""
    half = len(prefixes) // 2
    return zip(packing.groups, prefixes[:half], prefixes[half:], strict=True)


# ---- FlashAttention of variable length on CUDA ----


def _aten_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int],
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    flash = torch.ops.aten._flash_attention_forward
    return flash(q, k, v, cu_q, cu_k, *longest, 0.0, causal, False, scale=scale)[:2]


def _package_varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int],
    causal: bool, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    flash_attn = importlib.import_module("flash_attn")

    options: dict[str, Any] = {"softmax_scale": scale, "causal": causal, "return_attn_probs": True}
    return flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, *longest, **options)[:2]


# name: the package that it needs, and (q, k, v, cu_q, cu_k, longest, causal, scale) → out, lse;
# out is (N, H, D), lse (H, N) in fp32.
FLASH_CUDA: dict[str, tuple[str, Callable[..., tuple[Tensor, Tensor]]]] = {
    "flash-attn package": ("flash_attn", _package_varlen),
    "aten flash, cuda": ("torch", _aten_varlen),
}


def _flash_cuda(
    operands: Operands,
    packing: Packing,
    scale: float,
    flash: Callable[..., tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    query, key, value, prefix_keys, prefix_values = operands
    cu, longest = packing.cu_seqlens, packing.longest
    out, lse = flash(query, key, value, cu, cu, (longest, longest), True, scale)
    lse = lse.T
    kept = [i for i, s in enumerate(operands.prefix_lengths) if s]
    if not kept:
        return out, lse
    # Groups behind nothing stay out: kernels differ in the log-sum-exp of no keys at all.
    rows = [packing.groups[i] for i in kept]
    every = len(kept) == len(packing.groups)
    q = query if every else torch.cat([query[x] for x in rows])
    k, v = (_in_one_row([x[i] for i in kept]).transpose(0, 1) for x in (prefix_keys, prefix_values))
    queries = [x.stop - x.start for x in rows]
    lengths = [operands.prefix_lengths[i] for i in kept]
    cu_q, cu_k = packing.bounds(queries), packing.bounds(lengths)
    out_p, lse_p = flash(q, k, v, cu_q, cu_k, (max(queries), max(lengths)), False, scale)
    if every:
        return _merge(out_p, lse_p.T, out, lse)
    out, lse = out.float(), lse.clone()
    parts = zip(rows, out_p.split(queries), lse_p.T.split(queries), strict=True)
    for group, part, part_lse in parts:
        out[group], lse[group] = _merge(part, part_lse, out[group], lse[group])
    return out, lse


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
    for group, prefix_key, prefix_value in _by_group(packing, (*prefix_keys, *prefix_values)):
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
    return _merge(torch.cat(outs), torch.cat(lses), out, lse)


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
