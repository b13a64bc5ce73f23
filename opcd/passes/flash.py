"""Fused attention kernels behind one autograd.Function, for CPU and CUDA.

The attention of packed sequences has two parts, each a softmax of its own with a log-sum-exp: a
query attends the prefix of its group, and its own sequence up to itself. A kernel computes either;
they are merged here. The backward of a part takes the merged output and the merged log-sum-exp,
since its probabilities exp(score − lse) are then those of the whole softmax.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opcd.passes.packing import Packing


class Part(NamedTuple):
    """What a kernel makes of one part."""

    out: Tensor  # (N, H, D)
    lse: Tensor  # (N, H), fp32; −inf, and 0 in `out`, where a query sees nothing
    random: tuple[Tensor, ...] = ()  # what the kernel's backward wants back


class Kernel(Protocol):
    """Both parts of the attention, and their gradients.

    Prefixes are the keys (H_kv, S, D) of each group, then the values of each; S may be 0.
    """

    has_backward: bool

    def own(self, packing: Packing, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Of each sequence up to the query."""
        ...

    def behind(self, packing: Packing, scale: float, q: Tensor, prefixes: Sequence[Tensor]) -> Part:
        """Of the prefix of the query's group."""
        ...

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the tensors of a backward are given in."""
        ...

    def own_backward(
        self,
        packing: Packing,
        scale: float,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of: Part,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of q, k and v; `of` has the merged output and log-sum-exp, as in the next."""
        ...

    def behind_backward(
        self,
        packing: Packing,
        scale: float,
        grad: Tensor,
        q: Tensor,
        prefixes: Sequence[Tensor],
        of: Part,
    ) -> tuple[Tensor, list[Tensor]]:
        """Of q, and of each of the prefixes."""
        ...


def fused_attention(
    kernel: Kernel,
    packing: Packing,
    scale: float,
    query: Tensor,  # (N, H, D), packed
    key: Tensor,  # (N, H_kv, D)
    value: Tensor,  # (N, H_kv, D)
    prefixes: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:  # (N, H, D) in the query's dtype, (N, H) fp32 without a gradient
    """softmax(scale · q kᵀ) v over the prefix of each group and the own sequence."""
    out, lse = _Fused.apply(kernel, packing, scale, query, key, value, *prefixes)
    return out, lse


def merged(prefix: Part, own: Part) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over both, in fp32."""
    weight = torch.sigmoid(own.lse - prefix.lse)[..., None]
    lse = torch.logaddexp(own.lse, prefix.lse)
    return torch.lerp(prefix.out.float(), own.out.float(), weight), lse


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernel: Kernel,
        packing: Packing,
        scale: float,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *prefixes: Tensor,
    ) -> tuple[Tensor, Tensor]:
        own = kernel.own(packing, scale, query, key, value)
        out, lse, behind = own.out, own.lse, None
        if any(x.shape[1] for x in prefixes):
            behind = kernel.behind(packing, scale, query, prefixes)
            out, lse = merged(behind, own)
            out = out.to(query.dtype)
        random = own.random, () if behind is None else behind.random
        ctx.save_for_backward(query, key, value, out, lse, *prefixes, *chain(*random))
        ctx.kernel, ctx.packing, ctx.scale = kernel, packing, scale
        ctx.counts = len(prefixes), *map(len, random)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        kernel, where = ctx.kernel, (ctx.packing, ctx.scale)
        query, key, value, out, lse, *others = ctx.saved_tensors
        prefixes, own, behind = _split(others, ctx.counts)
        dtype, wide = query.dtype, kernel.backward_dtype(query.dtype)
        query, key, value, out, grad = (x.to(wide) for x in (query, key, value, out, grad))
        prefixes = [x.to(wide) for x in prefixes]
        merged_part = Part(out, lse, tuple(own))
        dq, dk, dv = kernel.own_backward(*where, grad, query, key, value, merged_part)
        of_prefixes: list[Tensor | None] = [None] * len(prefixes)
        if any(x.shape[1] for x in prefixes):
            part = merged_part._replace(random=tuple(behind))
            more, found = kernel.behind_backward(*where, grad, query, prefixes, part)
            dq, of_prefixes = dq + more, [x.to(dtype) for x in found]
        return None, None, None, *(x.to(dtype) for x in (dq, dk, dv)), *of_prefixes


def _split(tensors: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    rest = iter(tensors)
    return [[next(rest) for _ in range(n)] for n in counts]


def _halves(x: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The keys of each group's prefix, and the values."""
    return x[: len(x) // 2], x[len(x) // 2 :]


# ---- aten's kernel for CPUs: rectangles ----


class CpuFlash:
    """Sequences of like length are the rows of a rectangle; a prefix is attended a group at a time.

    The backward is in fp32 whatever came in: more exact, and on short sequences several times
    faster.
    """

    has_backward = True

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if dtype.itemsize == 2 else dtype

    def own(self, packing: Packing, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Part:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for block in packing.blocks:
            rows, keys, values = (block.spread(x) for x in (q, k, v))
            keys, values = (_repeated(x, q.shape[1]) for x in (keys, values))
            out, lse = flash(rows, keys, values, 0.0, True, scale=scale)
            outs.append(block.gather(out))
            lses.append(block.gather(lse[..., None])[..., 0])
        return Part(packing.joined(outs), packing.joined(lses))

    def behind(self, packing: Packing, scale: float, q: Tensor, prefixes: Sequence[Tensor]) -> Part:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        outs, lses = [], []
        for group, k, v in _by_group(packing, prefixes):
            rows, n = q[group], group.stop - group.start
            if not k.shape[1]:
                outs.append(torch.zeros_like(rows))
                lses.append(q.new_full(rows.shape[:2], -torch.inf, dtype=torch.float32))
                continue
            out, lse = flash(_fold(rows, len(k)), k[None], v[None], 0.0, False, scale=scale)
            outs.append(_unfold(out[0], n))
            lses.append(_unfold(lse[0], n))
        out, lse = (x[0] if len(x) == 1 else torch.cat(x) for x in (outs, lses))
        return Part(out, lse)

    def own_backward(
        self,
        packing: Packing,
        scale: float,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of: Part,
    ) -> tuple[Tensor, Tensor, Tensor]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        heads, kv_heads = q.shape[1], k.shape[1]
        parts: list[tuple[Tensor, ...]] = []
        for block in packing.blocks:
            rows, keys, values, out = (block.spread(x) for x in (q, k, v, of.out))
            keys, values = (_repeated(x, heads) for x in (keys, values))
            d_out, lse = block.spread(grad, pad=0.0), block.spread(of.lse[..., None])[..., 0]
            dq, dk, dv = flash(d_out, rows, keys, values, out, lse, 0.0, True, scale=scale)
            dk, dv = (x.unflatten(1, (kv_heads, -1)).sum(2) for x in (dk, dv))
            parts.append(tuple(block.gather(x) for x in (dq, dk, dv)))
        dq, dk, dv = (packing.joined(x) for x in zip(*parts, strict=True))
        return dq, dk, dv

    def behind_backward(
        self,
        packing: Packing,
        scale: float,
        grad: Tensor,
        q: Tensor,
        prefixes: Sequence[Tensor],
        of: Part,
    ) -> tuple[Tensor, list[Tensor]]:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        of_q, of_keys, of_values = [], [], []
        for group, k, v in _by_group(packing, prefixes):
            if not k.shape[1]:
                of_q.append(torch.zeros_like(q[group]))
                of_keys.append(torch.zeros_like(k))
                of_values.append(torch.zeros_like(v))
                continue
            rows, out, d_out = (_fold(x[group], len(k)) for x in (q, of.out, grad))
            lse = _fold(of.lse[group][..., None], len(k))[..., 0]
            dq, dk, dv = flash(d_out, rows, k[None], v[None], out, lse, 0.0, False, scale=scale)
            of_q.append(_unfold(dq[0], group.stop - group.start))
            of_keys.append(dk[0])
            of_values.append(dv[0])
        return of_q[0] if len(of_q) == 1 else torch.cat(of_q), [*of_keys, *of_values]


def _by_group(
    packing: Packing, prefixes: Sequence[Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The tokens of each group, and the keys and values of its prefix."""
    return zip(packing.groups, *_halves(prefixes), strict=True)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(B, H_kv, T, D) → (B, H, T, D)."""
    return x.repeat_interleave(heads // x.shape[1], 1)


def _fold(x: Tensor, kv_heads: int) -> Tensor:
    """(N, H, D) → (1, H_kv, G · N, D): heads that share a key become more queries of it."""
    n, heads, width = x.shape
    groups = x.view(n, kv_heads, heads // kv_heads, width)
    return groups.permute(1, 2, 0, 3).reshape(1, kv_heads, -1, width)


def _unfold(x: Tensor, n: int) -> Tensor:
    """(H_kv, G · N, ...) → (N, H, ...)."""
    return x.unflatten(1, (-1, n)).flatten(0, 1).transpose(0, 1)


# ---- FlashAttention of variable length on CUDA ----


class Lengths(NamedTuple):
    """Where the sequences of queries and of keys begin and end, and how scores are made."""

    cu_q: Tensor  # (B + 1,) int32
    cu_k: Tensor  # (B + 1,) int32
    longest: tuple[int, int]  # sequence of queries, and of keys
    causal: bool
    scale: float


# q (N, H, D), k, v (M, H_kv, D), lengths → out, lse (H, N) fp32, and what the backward wants back
Forward = Callable[[Tensor, Tensor, Tensor, Lengths], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
# grad, q, k, v, out, lse (H, N), lengths, what the forward kept → dq, dk, dv
Backward = Callable[..., tuple[Tensor, Tensor, Tensor]]


class VarlenFlash:
    """Kernels that take all sequences in one row and heads that share a key as they are."""

    def __init__(self, forward: Forward, backward: Backward | None = None) -> None:
        self._forward = forward
        self._backward = backward
        self.has_backward = backward is not None

    def backward_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def own(self, packing: Packing, scale: float, q: Tensor, k: Tensor, v: Tensor) -> Part:
        out, lse, random = self._forward(q, k, v, self._own(packing, scale))
        return Part(out, lse.T, random)

    def behind(self, packing: Packing, scale: float, q: Tensor, prefixes: Sequence[Tensor]) -> Part:
        kept = _Kept(packing, prefixes)
        keys, values = (kept.in_one_row(x) for x in _halves(prefixes))
        out, lse, random = self._forward(kept.rows(q), keys, values, kept.lengths(scale))
        # Groups behind nothing stay out: kernels differ in the log-sum-exp of no keys at all.
        return Part(kept.spread(out), kept.spread(lse.T, -torch.inf), random)

    def own_backward(
        self,
        packing: Packing,
        scale: float,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        of: Part,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self._backward is not None
        lengths, lse = self._own(packing, scale), of.lse.T.contiguous()
        return self._backward(grad.contiguous(), q, k, v, of.out, lse, lengths, of.random)

    def behind_backward(
        self,
        packing: Packing,
        scale: float,
        grad: Tensor,
        q: Tensor,
        prefixes: Sequence[Tensor],
        of: Part,
    ) -> tuple[Tensor, list[Tensor]]:
        assert self._backward is not None
        kept = _Kept(packing, prefixes)
        keys, values = (kept.in_one_row(x) for x in _halves(prefixes))
        rows, out, d_out, lse = (kept.rows(x) for x in (q, of.out, grad, of.lse))
        dq, dk, dv = self._backward(
            *(d_out.contiguous(), rows, keys, values, out, lse.T.contiguous()),
            *(kept.lengths(scale), of.random),
        )
        return kept.spread(dq), [*kept.by_group(dk), *kept.by_group(dv)]

    def _own(self, packing: Packing, scale: float) -> Lengths:
        cu, longest = packing.cu_seqlens, packing.longest
        return Lengths(cu, cu, (longest, longest), True, scale)


class _Kept:
    """The groups of a packed row that stand behind a prefix, as one row of their own."""

    def __init__(self, packing: Packing, prefixes: Sequence[Tensor]) -> None:
        self._packing = packing
        self._sizes = [x.shape[1] for x in _halves(prefixes)[0]]  # S of each group
        self._groups = [g for g, s in zip(packing.groups, self._sizes, strict=True) if s]
        self._every = len(self._groups) == len(packing.groups)

    def rows(self, x: Tensor) -> Tensor:
        """(N, ...) of all tokens → those of these groups."""
        return x if self._every else torch.cat([x[group] for group in self._groups])

    def spread(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """Of the tokens of these groups → (N, ...), `empty` for the others."""
        if self._every:
            return x
        whole = x.new_full((self._packing.groups[-1].stop, *x.shape[1:]), empty)
        for group, part in zip(self._groups, x.split(self._queries()), strict=True):
            whole[group] = part
        return whole

    def in_one_row(self, parts: Sequence[Tensor]) -> Tensor:
        """(H_kv, S, D) of each group → (Σ S, H_kv, D)."""
        return (parts[0] if len(parts) == 1 else torch.cat([*parts], 1)).transpose(0, 1)

    def by_group(self, x: Tensor) -> list[Tensor]:
        """(Σ S, H_kv, D) → (H_kv, S, D) of each group."""
        return [part.transpose(0, 1) for part in x.split(self._sizes)]

    def lengths(self, scale: float) -> Lengths:
        queries, keys = self._queries(), [s for s in self._sizes if s]
        cu = self._packing.bounds(queries), self._packing.bounds(keys)
        return Lengths(*cu, (max(queries), max(keys)), False, scale)

    def _queries(self) -> list[int]:
        return [group.stop - group.start for group in self._groups]


def _aten_forward(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    flash = torch.ops.aten._flash_attention_forward
    out, lse, state, unused, _ = flash(
        q, k, v, at.cu_q, at.cu_k, *at.longest, 0.0, at.causal, False, scale=at.scale
    )
    return out, lse, (state, unused)


def _aten_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, at: Lengths,
    random: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    flash = torch.ops.aten._flash_attention_backward
    dq, dk, dv = flash(
        *(grad, q, k, v, out, lse, at.cu_q, at.cu_k, *at.longest, 0.0, at.causal, *random),
        scale=at.scale,
    )
    return dq, dk, dv


def _package_forward(
    q: Tensor, k: Tensor, v: Tensor, at: Lengths
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    # flash-attn-4 ships a folder `flash_attn` without this, and a wheel for another torch does not
    # load: whatever goes wrong here, `backends.py` finds when it tries the kernel.
    flash = importlib.import_module("flash_attn").flash_attn_varlen_func
    options: dict[str, Any] = {
        "softmax_scale": at.scale,
        "causal": at.causal,
        "return_attn_probs": True,
    }
    out, lse = flash(q, k, v, at.cu_q, at.cu_k, *at.longest, **options)[:2]
    return out, lse, ()


# By the name of a backend; of those that fit a device the fastest first.
KERNELS: dict[str, Kernel] = {
    "aten flash, cpu": CpuFlash(),
    "flash-attn package": VarlenFlash(_package_forward),  # its backward has no public name
    "aten flash, cuda": VarlenFlash(_aten_forward, _aten_backward),
}
