"""Logits of both models in one matrix product that keeps them on the chip.

`dual_product_kernel` multiplies one tile of tokens with one tile of both heads, into two
accumulators. No logit leaves it: it writes the tile's statistics, six fp32 numbers a token, and two
bf16 numbers an entry, E and x. `dual_rows_kernel`, one program a token, merges the statistics into
the divergence and writes the gradient over E.

    d = z − max of the tile, of either model   the only logits there are: fp32, centred
    δ = d_s − d_t                              rounded from fp32, so nothing cancels
    reverse KL   E = e^{d_s}                   x = δ − its mean under E: 0 where all of the mass is
    others       E = e^{max(d_s, d_t)}         x = δ; together they give either model's exponential
    statistics   of either model the maximum and Σ e^d; Σ e^{d_s} δ; Σ e^{d_s} d_s

Two bf16 numbers suffice: alone they cost the gradient 0.05 %, where rounding it to bf16 costs
0.13 % anyway. A reverse KL is the difference of the normalisers, in fp32, and below NEAR, where
that has too few digits, the sum of terms that are never negative. The other divergences are that
sum, whose bf16 numbers leave an error of up to 0.5 % in a single token's value.

Memory traffic a token and vocabulary entry, in bytes: 4 written by the product, 4 read and 2
written by the second kernel, 0.4 for the statistics, where `rows_triton.py` moves 26. In exchange
the product is Triton's, not the library's. Programs that run at one time share their entries of the
vocabulary, so that the heads are read from memory once; each takes tile after tile, so that one is
written while the next is multiplied.

Tiles are fetched and written by the copy engine (TMA: compute capability 9.0 and later; without it
Triton would load one number at a time).
"""
# mypy: disallow-untyped-defs=False

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from opcd_kernels.options import DIVERGENCES, Options
from opcd_kernels.terms_triton import (
    FORWARD_KL,
    INTERPRETED,
    JSD,
    LOWEST,
    REVERSE_KL,
    kl_terms,
    rounded,
    softplus,
)

STATISTICS = 6  # a token and tile
ENTRIES = 1024  # a program of `dual_rows_kernel` handles at once: 8 a thread
THREADS = 128
LANES = 512  # tiles whose statistics are merged at once
NEAR = tl.constexpr(1e-4)  # nats, times 1 + log Σ e^{z − max}, as the normalisers' rounding grows
_INTERPRETED = tl.constexpr(INTERPRETED)


class Tile(NamedTuple):
    """What one program of `dual_product_kernel` multiplies, and how."""

    tokens: int = 128
    entries: int = 128
    depth: int = 64  # hidden units a step
    group: int = 16  # tiles of tokens that meet a tile of the vocabulary one after another
    threads: int = 256
    stages: int = 4  # steps in shared memory: one multiplied, the others under way
    programs: int = 1  # a multiprocessor, each with many tiles in turn; 0: a program a tile


@triton.jit
def _dot(a, b, total):
    if _INTERPRETED:  # the interpreter multiplies the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total)


@triton.jit
def _centred(z, inside, inv_temperature):
    """Logits relative to the largest of their row in the tile, and that largest one."""
    # Finite also beyond the vocabulary: −inf − −inf is not a number.
    z = tl.where(inside, z * inv_temperature, LOWEST)
    largest = tl.max(z, axis=1)
    return z - largest[:, None], largest


@triton.jit(do_not_specialize=["C"])  # the last chunk's would compile it anew
def dual_product_kernel(
    hs_desc,  # (C, D_s) the student's hidden states; this and the next three in bf16
    ws_desc,  # (V, D_s) its head
    ht_desc,  # (C, D_t) the teacher's
    wt_desc,  # (V, D_t)
    e_desc,  # (C, width) bf16, width = tiles · BLOCK_V
    x_desc,  # (C, width) bf16
    statistics_ptr,  # (C, STATISTICS, tiles) fp32
    C,
    V,
    D_s,
    D_t,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    SHARED: tl.constexpr,  # both heads are one matrix: read once
    STATISTICS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_C: tl.constexpr,
):
    tiles_c, tiles_v = tl.cdiv(C, BLOCK_C), tl.cdiv(V, BLOCK_V)
    for place in tl.range(tl.program_id(0), tiles_c * tiles_v, tl.num_programs(0)):
        group, rest = place // (GROUP_C * tiles_v), place % (GROUP_C * tiles_v)
        group_c = tl.minimum(GROUP_C, tiles_c - group * GROUP_C)
        tile_v = rest // group_c
        first_c, first_v = (group * GROUP_C + rest % group_c) * BLOCK_C, tile_v * BLOCK_V

        z_s = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
        z_t = tl.zeros([BLOCK_C, BLOCK_V], tl.float32)
        for k in range(0, D_s, BLOCK_D):
            w = ws_desc.load([first_v, k]).T
            z_s = _dot(hs_desc.load([first_c, k]), w, z_s)
            if SHARED:
                z_t = _dot(ht_desc.load([first_c, k]), w, z_t)
        if not SHARED:
            for k in range(0, D_t, BLOCK_D):
                z_t = _dot(ht_desc.load([first_c, k]), wt_desc.load([first_v, k]).T, z_t)

        offs_c, offs_v = first_c + tl.arange(0, BLOCK_C), first_v + tl.arange(0, BLOCK_V)
        mask_c, inside = offs_c < C, offs_v[None, :] < V
        d_s, max_s = _centred(z_s, inside, inv_temperature)
        d_t, max_t = _centred(z_t, inside, inv_temperature)
        sum_t = tl.sum(tl.exp(d_t), axis=1)
        e, delta = tl.exp(d_s), d_s - d_t
        out_ptr = statistics_ptr + offs_c.to(tl.int64) * (STATISTICS * tiles_v) + tile_v
        tl.store(out_ptr, max_s, mask=mask_c)
        sum_s, e_delta = tl.sum(e, axis=1), tl.sum(e * delta, axis=1)
        tl.store(out_ptr + tiles_v, sum_s, mask=mask_c)
        tl.store(out_ptr + 2 * tiles_v, max_t, mask=mask_c)
        tl.store(out_ptr + 3 * tiles_v, sum_t, mask=mask_c)
        tl.store(out_ptr + 4 * tiles_v, e_delta, mask=mask_c)
        tl.store(out_ptr + 5 * tiles_v, tl.sum(e * d_s, axis=1), mask=mask_c)
        if DIVERGENCE == REVERSE_KL:
            delta -= (e_delta / sum_s)[:, None]
        else:
            e = tl.exp(d_s + tl.maximum(-delta, 0.0))  # d_t itself would have to be kept
        e_desc.store([first_c, first_v], rounded(e, tl.bfloat16))
        x_desc.store([first_c, first_v], rounded(delta, tl.bfloat16))


@triton.jit
def _merged(statistics_ptr, tiles, end, LANES: tl.constexpr):
    """Of a token: both maxima, log Σ e^{z − max} of both, Σ p_s (d_s − d_t), Σ p_s d_s, where d is
    relative to the token's maxima."""
    max_s = tl.full([LANES], LOWEST, tl.float32)
    max_t = tl.full([LANES], LOWEST, tl.float32)
    for start in range(0, end, LANES):
        j = start + tl.arange(0, LANES)
        mask = j < end
        max_s = tl.maximum(max_s, tl.load(statistics_ptr + j, mask=mask, other=LOWEST))
        max_t = tl.maximum(max_t, tl.load(statistics_ptr + 2 * tiles + j, mask=mask, other=LOWEST))
    max_s, max_t = tl.max(max_s, axis=0), tl.max(max_t, axis=0)
    sum_s = tl.zeros([LANES], tl.float32)
    sum_t = tl.zeros([LANES], tl.float32)
    moment = tl.zeros([LANES], tl.float32)
    energy = tl.zeros([LANES], tl.float32)
    for start in range(0, end, LANES):
        j = start + tl.arange(0, LANES)
        mask = j < end
        below_s = tl.load(statistics_ptr + j, mask=mask, other=LOWEST) - max_s
        l_s = tl.load(statistics_ptr + tiles + j, mask=mask, other=0.0)
        below_t = tl.load(statistics_ptr + 2 * tiles + j, mask=mask, other=LOWEST) - max_t
        l_t = tl.load(statistics_ptr + 3 * tiles + j, mask=mask, other=0.0)
        e_delta = tl.load(statistics_ptr + 4 * tiles + j, mask=mask, other=0.0)
        e_d = tl.load(statistics_ptr + 5 * tiles + j, mask=mask, other=0.0)
        scale = tl.exp(below_s)
        sum_s += scale * l_s
        sum_t += tl.exp(below_t) * l_t
        moment += scale * (e_delta + l_s * (below_s - below_t))
        energy += scale * (e_d + l_s * below_s)
    total = tl.sum(sum_s, axis=0)
    log_s, log_t = tl.log(total), tl.log(tl.sum(sum_t, axis=0))
    moment, energy = tl.sum(moment, axis=0) / total, tl.sum(energy, axis=0) / total
    return max_s, max_t, log_s, log_t, moment, energy


@triton.jit
def _probabilities(
    e_ptr, x_ptr, statistics_ptr, start, tiles, max_s, max_t, log_s, log_t,
    DIVERGENCE: tl.constexpr, TILES: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """p_s, p_t and r = log p_s − log p_t of the entries of TILES tiles; and where they lie."""
    j = start + tl.arange(0, TILES)
    mask = j < tiles
    below_s = tl.load(statistics_ptr + j, mask=mask, other=LOWEST) - max_s
    below_t = tl.load(statistics_ptr + 2 * tiles + j, mask=mask, other=LOWEST) - max_t
    offsets = j[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    e = tl.load(e_ptr + offsets, mask=mask[:, None], other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=mask[:, None], other=0.0).to(tl.float32)
    shift = (below_s - below_t) - (log_s - log_t)
    if DIVERGENCE == REVERSE_KL:
        sum_s = tl.load(statistics_ptr + tiles + j, mask=mask, other=1.0)
        shift += tl.load(statistics_ptr + 4 * tiles + j, mask=mask, other=0.0) / sum_s
    r = x + shift[:, None]
    p_s = tl.exp(below_s - log_s)[:, None] * e
    if DIVERGENCE == REVERSE_KL:
        p_t = tl.where(p_s > 0, p_s * tl.exp(tl.minimum(-r, 80.0)), 0.0)
    else:  # e is the larger one's
        p_s *= tl.exp(tl.minimum(x, 0.0))
        p_t = tl.exp(below_t - log_t)[:, None] * e * tl.exp(tl.minimum(-x, 0.0))
    return p_s, p_t, r, offsets, mask[:, None]


@triton.jit
def dual_rows_kernel(
    e_ptr,  # (C, width) bf16; the gradient in its place where GRADIENT
    x_ptr,  # (C, width) bf16
    statistics_ptr,  # (C, STATISTICS, tiles) fp32
    factors_ptr,  # (C,) fp32; 0 drops the row
    value_ptr,  # (C,) fp32
    entropy_ptr,  # (C,) fp32
    tiles,
    beta,
    rest,  # 1 − β
    DIVERGENCE: tl.constexpr,
    GRADIENT: tl.constexpr,
    STATISTICS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LANES: tl.constexpr,
):
    row = tl.program_id(0)
    offset = row.to(tl.int64) * tiles  # times BLOCK_V it passes 2³¹
    e_ptr += offset * BLOCK_V
    x_ptr += offset * BLOCK_V
    statistics_ptr += offset * STATISTICS
    factor = tl.load(factors_ptr + row)
    dropped = factor == 0
    end = tl.where(dropped, 0, tiles)
    max_s, max_t, log_s, log_t, moment, energy = _merged(statistics_ptr, tiles, end, LANES)

    center = moment - (log_s - log_t)  # the reverse KL, which centres its gradient
    log_odds = tl.log(beta) - tl.log(rest)  # see rows_triton.py
    if GRADIENT and DIVERGENCE == JSD:
        terms = tl.zeros([TILES, BLOCK_V], tl.float32)
        total = tl.zeros([TILES, BLOCK_V], tl.float32)
        for start in range(0, end, TILES):
            p_s, _, r, _, _ = _probabilities(
                e_ptr, x_ptr, statistics_ptr, start, tiles, max_s, max_t, log_s, log_t,
                DIVERGENCE, TILES, BLOCK_V,
            )  # fmt: skip
            terms += p_s * softplus(log_odds - r)
            total += p_s
        center = tl.sum(terms) / tl.sum(total)  # what was rounded need not sum to 1

    value = tl.zeros([TILES, BLOCK_V], tl.float32)
    for start in range(0, end, TILES):
        p_s, p_t, r, offsets, mask = _probabilities(
            e_ptr, x_ptr, statistics_ptr, start, tiles, max_s, max_t, log_s, log_t,
            DIVERGENCE, TILES, BLOCK_V,
        )  # fmt: skip
        if DIVERGENCE == REVERSE_KL:
            value += kl_terms(p_s, p_t, r)
            dz = p_s * (r - center)
        elif DIVERGENCE == FORWARD_KL:
            value += kl_terms(p_t, p_s, -r)
            # p_s − p_t, from the larger one: both carry the same rounding of e.
            a = tl.abs(r)
            less = tl.where(a < 0.02, a * (1 - a * (1 / 2 - a * (1 / 6))), 1 - tl.exp(-a))
            dz = tl.where(r > 0, p_s, -p_t) * less
        else:
            over_s, over_t = softplus(log_odds - r), softplus(r - log_odds)
            p_m = rest * p_s + beta * p_t
            value += rest * kl_terms(p_s, p_m, -tl.log(rest) - over_s)
            value += beta * kl_terms(p_t, p_m, -tl.log(beta) - over_t)
            dz = rest * p_s * (center - over_s)
        if GRADIENT:
            tl.store(e_ptr + offsets, rounded(dz * factor, tl.bfloat16), mask=mask)
    found = tl.sum(value)
    if DIVERGENCE == REVERSE_KL:
        found = tl.where(center > (1 + log_s) * NEAR, center, found)
    tl.store(value_ptr + row, tl.where(dropped, 0.0, found))
    tl.store(entropy_ptr + row, tl.where(dropped, 0.0, log_s - energy))
    if GRADIENT:
        for start in range(0, tl.where(dropped, tiles, 0), TILES):
            j = start + tl.arange(0, TILES)[:, None]
            zeros = tl.zeros([TILES, BLOCK_V], tl.bfloat16)
            tl.store(e_ptr + j * BLOCK_V + tl.arange(0, BLOCK_V)[None, :], zeros, mask=j < tiles)


class DualProduct:
    """Divergence and gradient of chunks of tokens between two heads."""

    def __init__(
        self,
        student_weight: Tensor,  # (V, D_s)
        teacher_weight: Tensor,  # (V, D_t); the same tensor where the head is shared
        tokens: int,  # of the largest chunk
        options: Options,
        need_grad: bool,
        tile: Tile = Tile(),  # noqa: B008, a constant
    ) -> None:
        self.options, self._need_grad = options, need_grad
        self._tile = tile
        self._shared = student_weight is teacher_weight
        head = _operand(student_weight)
        self._heads = head, head if self._shared else _operand(teacher_weight)
        self._tiles = triton.cdiv(len(student_weight), self._tile.entries)
        self._entries = self._heads[0].new_empty(2, tokens, self._tiles * self._tile.entries)
        self._statistics = self._heads[0].new_empty(
            tokens, STATISTICS, self._tiles, dtype=torch.float32
        )

    def __call__(
        self,
        student_hidden: Tensor,  # (C, D_s)
        teacher_hidden: Tensor,  # (C, D_t)
        factors: Tensor,  # (C,) fp32, what each row's gradient is multiplied with; 0 drops the row
    ) -> tuple[Tensor, ...]:  # per_token (C,), student_entropy (C,), dz (C, V) bf16, scratch
        """Two launches. The next call overwrites dz."""
        value, entropy = torch.empty_like(factors), torch.empty_like(factors)
        here = contextlib.nullcontext() if INTERPRETED else torch.cuda.device_of(factors)
        with here:
            e, x = self.product(student_hidden, teacher_hidden)
            dual_rows_kernel[factors.shape](
                e,
                x,
                self._statistics,
                factors,
                value,
                entropy,
                self._tiles,
                self.options.beta,
                1 - self.options.beta,
                DIVERGENCE=DIVERGENCES.index(self.options.divergence),
                GRADIENT=self._need_grad,
                STATISTICS=STATISTICS,
                TILES=ENTRIES // self._tile.entries,
                BLOCK_V=self._tile.entries,
                LANES=LANES,
                num_warps=THREADS // 32,
            )
        return value, entropy, e[:, : self.options.vocab_size], x

    def product(self, h_s: Tensor, h_t: Tensor) -> Tensor:
        """E and x (2, C, width); the statistics stay here. One launch."""
        tile, v = self._tile, self.options.vocab_size
        e, x = entries = self._entries[:, : len(h_s)]

        def tiled(x: Tensor, rows: int, columns: int = tile.depth) -> Any:
            return TensorDescriptor.from_tensor(x, [rows, columns])

        (w_s, w_t), h_s, h_t = self._heads, _operand(h_s), _operand(h_t)
        tiles = triton.cdiv(len(e), tile.tokens) * self._tiles
        programs = tile.programs * _multiprocessors(e.device)
        dual_product_kernel[(min(programs or tiles, tiles),)](
            tiled(h_s, tile.tokens),
            tiled(w_s, tile.entries),
            tiled(h_t, tile.tokens),
            tiled(w_t, tile.entries),
            tiled(e, tile.tokens, tile.entries),
            tiled(x, tile.tokens, tile.entries),
            self._statistics,
            len(e),
            v,
            h_s.shape[1],
            h_t.shape[1],
            1 / self.options.temperature,
            DIVERGENCE=DIVERGENCES.index(self.options.divergence),
            SHARED=self._shared,
            STATISTICS=STATISTICS,
            BLOCK_C=tile.tokens,
            BLOCK_V=tile.entries,
            BLOCK_D=tile.depth,
            GROUP_C=tile.group,
            num_warps=tile.threads // 32,
            num_stages=tile.stages,
        )
        return entries


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 3  # for the interpreter: a few programs with several tiles
    return torch.cuda.get_device_properties(device).multi_processor_count


def _operand(x: Tensor) -> Tensor:
    """x in bf16 and as tiles of it can be fetched: rows that start at multiples of 16 bytes."""
    x = x.to(torch.bfloat16)
    if x.stride() == (x.shape[1], 1) and x.shape[1] % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    copy = x.new_zeros(len(x), triton.cdiv(x.shape[1], 8) * 8)
    copy[:, : x.shape[1]] = x
    return copy
