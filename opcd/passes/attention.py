"""Attention of packed sequences that share a prefix, merged from two parts by their log-sum-exps.

Each query attends (i) the whole prefix, which no sequence holds a copy of, and (ii) its own
sequence up to itself. Either part is a softmax attention of its own with a log-sum-exp lse; the
attention over both is

    w = sigmoid(lse_own − lse_prefix),   out = out_prefix + w (out_own − out_prefix)     in fp32

The backward of the fused CPU kernel takes the merged output and the merged lse for either part,
since its probabilities exp(score − lse) are then those of the whole softmax.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from opcd.runtime.upload import uploaded

PLAIN_SCORES_BYTES = 64 * 2**20  # of the fp32 scores that plain PyTorch holds at a time


class Block(NamedTuple):
    """Neighbours of like length, as the rows of one rectangle."""

    start: int  # in the packed row
    stop: int
    rows: int
    width: int  # the longest
    take: Tensor | None  # (rows · width,): the token behind `start` that each place shows
    real: Tensor | None  # (stop − start,): the places that are no pads; None for both: no pads

    def spread(self, x: Tensor, pad: float | None = None) -> Tensor:
        """(N, H, D) packed → (rows, H, width, D); pads repeat a token, or hold `pad`."""
        x = x[self.start : self.stop]
        if self.take is not None and self.real is not None:
            if pad is None:
                x = x[self.take]
            else:
                empty = x.new_full((self.rows * self.width, *x.shape[1:]), pad)
                x = empty.index_copy(0, self.real, x)
        return x.unflatten(0, (self.rows, self.width)).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """(rows, H, width, D) → (stop − start, H, D) without the pads."""
        x = x.transpose(1, 2).flatten(0, 1)
        return x if self.real is None else x[self.real]


class Packing:
    """Where sequences lie in one packed row of N tokens, the longest first.

    Everything is worked out on the host and uploaded, so that no pass waits for the one before.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        assert all(lengths), "an empty sequence"
        assert list(lengths) == sorted(lengths, reverse=True), "longest first"
        self.longest = lengths[0]
        self.starts = [0, *accumulate(lengths)]  # B + 1
        self.cu_seqlens = uploaded(torch.tensor(self.starts).int(), device)  # (B + 1,) int32
        # (N,): how many tokens of its own sequence stand in front of each token
        self.offsets = uploaded(torch.cat([torch.arange(n) for n in lengths]), device)
        self._lengths, self._device = lengths, device
        self._bounds: dict[int, Tensor] = {}

    def bounds(self, length: int) -> Tensor:
        """(2,) int32: 0 and `length`, uploaded once for all layers."""
        if length not in self._bounds:
            self._bounds[length] = uploaded(torch.tensor([0, length]).int(), self._device)
        return self._bounds[length]

    @cached_property
    def blocks(self) -> list[Block]:
        """For kernels that take rectangles; those that take `cu_seqlens` never ask for them."""
        blocks: list[Block] = []
        lengths, first = self._lengths, 0
        for i in range(1, len(lengths) + 1):
            # At most half of a rectangle is padding, and there are few rectangles.
            if i == len(lengths) or 2 * lengths[i] < lengths[first]:
                blocks.append(_block(self.starts[first], lengths[first:i], self._device))
                first = i
        return blocks


def _block(start: int, lengths: Sequence[int], device: torch.device) -> Block:
    width, total = lengths[0], sum(lengths)
    if lengths[-1] == width:
        return Block(start, start + total, len(lengths), width, None, None)
    n, column = torch.tensor(lengths), torch.arange(width)
    first = n.cumsum(0) - n
    take = first[:, None] + torch.minimum(column, n[:, None] - 1)  # (rows, width)
    real = (column < n[:, None]).flatten().nonzero()[:, 0]
    take, real = uploaded(take.flatten(), device), uploaded(real, device)
    return Block(start, start + total, len(lengths), width, take, real)


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
    prefix_key: Tensor  # (H_kv, S, D): the prefix's last S tokens; S may be 0
    prefix_value: Tensor  # (H_kv, S, D_v)


def prefix_attention(
    operands: Operands,
    packing: Packing,
    shape: Shape,
    backend: str,  # as `choose_backend` names it
) -> Tensor:  # (N, H, D_v)
    """Attention of each token to the prefix and to its own sequence up to itself.

    Equals full attention over prefix + sequence for each sequence alone. With a window the S kept
    tokens must hold every position that it shows.
    Numerics: scores and log-sum-exps in fp32, the merge in fp32, the result in the query's dtype.
    """
    if backend == "triton":
        from opcd_kernels.prefix_attention import prefix_attention_triton  # needs Triton

        cu_seqlens, longest = packing.cu_seqlens, packing.longest
        return prefix_attention_triton(*operands, cu_seqlens, longest, *shape)
    if backend == "aten flash, cpu":
        out, lse = _FlashCpu.apply(*operands, packing, shape.scale)
    elif backend == "plain":
        out, lse = _plain(operands, packing, shape)
    else:
        out, lse = _flash_cuda(operands, packing, shape.scale, FLASH_CUDA[backend][1])
    if shape.sinks is not None:
        out = out * torch.sigmoid(lse - shape.sinks.float())[..., None]
    return out.to(operands.query.dtype)


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
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
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
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefix_key: Tensor,
        prefix_value: Tensor,
        packing: Packing,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        (n, heads, _), kv_heads = query.shape, key.shape[1]
        outs, lses = [], []
        for block in packing.blocks:
            q, k, v = (block.spread(x) for x in (query, key, value))
            k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
            out, lse = flash(q, k, v, 0.0, True, scale=scale)
            outs.append(block.gather(out))
            lses.append(block.gather(lse[..., None])[..., 0])
        out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
        if prefix_key.shape[1]:
            q = _fold(query, kv_heads)
            out_p, lse_p = flash(q, prefix_key[None], prefix_value[None], 0.0, False, scale=scale)
            out, lse = _merge(_unfold(out_p[0], n), _unfold(lse_p[0], n), out, lse)
            out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, out, lse)
        ctx.packing, ctx.scale = packing, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        query, key, value, prefix_key, prefix_value, out, lse = ctx.saved_tensors
        (n, heads, _), kv_heads = query.shape, key.shape[1]
        group = heads // kv_heads
        parts: list[tuple[Tensor, ...]] = []
        for block in ctx.packing.blocks:
            q, k, v, o = (block.spread(x) for x in (query, key, value, out))
            k, v = (x.repeat_interleave(group, 1) for x in (k, v))
            do, m = block.spread(grad, pad=0.0), block.spread(lse[..., None])[..., 0]
            dq, dk, dv = flash(do, q, k, v, o, m, 0.0, True, scale=ctx.scale)
            dk, dv = (x.unflatten(1, (kv_heads, group)).sum(2) for x in (dk, dv))
            parts.append(tuple(block.gather(x) for x in (dq, dk, dv)))
        dq, dk, dv = (torch.cat(x) for x in zip(*parts, strict=True))
        if not prefix_key.shape[1]:
            return dq, dk, dv, None, None, None, None
        q, o, do = (_fold(x, kv_heads) for x in (query, out, grad))
        m = _fold(lse[..., None], kv_heads)[..., 0]
        k, v = prefix_key[None], prefix_value[None]
        dq_p, dk_p, dv_p = flash(do, q, k, v, o, m, 0.0, False, scale=ctx.scale)
        return dq + _unfold(dq_p[0], n), dk, dv, dk_p[0], dv_p[0], None, None


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
    query, key, value, prefix_key, prefix_value = operands
    n, s, cu, longest = len(query), prefix_key.shape[1], packing.cu_seqlens, packing.longest
    out, lse = flash(query, key, value, cu, cu, (longest, longest), True, scale)
    if not s:
        return out, lse.T
    cu_all, cu_k = packing.bounds(n), packing.bounds(s)
    k, v = prefix_key.transpose(0, 1), prefix_value.transpose(0, 1)
    out_p, lse_p = flash(query, k, v, cu_all, cu_k, (n, s), False, scale)
    return _merge(out_p, lse_p.T, out, lse.T)


# ---- plain PyTorch: windows, softcaps, any head width, gradients everywhere ----


def _plain(operands: Operands, packing: Packing, shape: Shape) -> tuple[Tensor, Tensor]:
    query, key, value, prefix_key, prefix_value = operands
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
    out, lse = torch.cat(outs), torch.cat(lses)
    s = prefix_key.shape[1]
    if not s:
        return out, lse
    outs, lses = [], []
    step = max(1, PLAIN_SCORES_BYTES // (4 * query.shape[1] * s))
    for q, offsets in zip(query.split(step), packing.offsets.split(step), strict=True):
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
