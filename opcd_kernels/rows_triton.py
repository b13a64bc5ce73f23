"""Divergence of rows of logits in one Triton kernel, and the gradient in the student's.

One program takes one token. Its first pass over both rows keeps running statistics in every lane
(maximum and, beside that one, sum of exponentials of both models: of a confident token the sum less
1 has the digits that count; for the reverse KL the centred moment below) and merges the lanes once
at the end, so that no loop holds a reduction across threads; a logit takes one exponential there,
as either the maximum or the logit is the new maximum. The second pass forms divergence, entropy and
gradient. A JSD takes one pass more: what centres its gradient needs both normalisers.

    A = Σ e^{z_s − m_s} [(z_s − m_s) − (z_t − m_t)]         centred on the maxima m
    moved to new maxima  A' = e^{m_s − m_s'} {A + l_s [(m_s − m_t) − (m_s' − m_t')]}
    KL(student ‖ teacher) = A / l_s − log l_s + log l_t     centres the gradient

The reported divergence is summed from terms that are never negative, p (e^{−r} − 1 + r), for small
r by the series r² (1/2 − r/6 + r²/24 − …), so no digit is lost where both models nearly agree.

Memory traffic a token and vocabulary entry, in bytes: 8 read in each pass, 2 written by the last (a
16-bit gradient into memory of its own; one in fp32 over the logits, where each thread overwrites
what it read itself). Rows are `row_width` wide, and written to their end: no mask cuts through a
16-byte access.
"""
# mypy: disallow-untyped-defs=False

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from opcd_kernels.options import KINDS, Options
from opcd_kernels.rows import Found, Rows
from opcd_kernels.terms_triton import (
    FORWARD_KL,
    INTERPRETED,
    JSD,
    LOWEST,
    MIXTURE,
    REVERSE_KL,
    expm1,
    kl_terms,
    log1p,
    rounded,
)

BLOCK_V = 1024  # vocabulary entries a program handles at once: one 16-byte load a thread and row
THREADS = 256
# No z · 1/τ − max in one rounding: the maximum is of rounded products, and must come to exactly 0.
FUSED = False


@triton.jit
def _tanh(x):
    a = tl.abs(x)
    x2 = x * x
    series = 1 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835))))
    e = tl.exp(-2 * a)
    far = (1 - e) / (1 + e)
    return tl.where(a < 0.25, x * series, tl.where(x < 0, -far, far))


@triton.jit
def _logits(row_ptr, bias_ptr, offsets, width, V, softcap, inv_temperature, BIAS, SOFTCAP):
    """Finished logits, −inf beyond the vocabulary, and the softcap's slope."""
    z = tl.load(row_ptr + offsets, mask=offsets < width, other=float("-inf"))
    if BIAS:
        z += tl.load(bias_ptr + offsets, mask=offsets < V, other=0).to(tl.float32)
    slope = 1.0
    if SOFTCAP:
        th = _tanh(z * (1 / softcap))
        slope = 1 - th * th
        z = tl.where(offsets < V, softcap * th, float("-inf"))
    return z * inv_temperature, slope


@triton.jit
def _both(
    zs_ptr, zt_ptr, bs_ptr, bt_ptr, offsets, width, V, softcap_s, softcap_t, inv_temperature,
    BIAS_S, BIAS_T, SOFTCAP_S, SOFTCAP_T,
):  # fmt: skip
    """The student's logits and slope, the teacher's logits."""
    z_s, slope = _logits(
        zs_ptr, bs_ptr, offsets, width, V, softcap_s, inv_temperature, BIAS_S, SOFTCAP_S
    )
    z_t, _ = _logits(
        zt_ptr, bt_ptr, offsets, width, V, softcap_t, inv_temperature, BIAS_T, SOFTCAP_T
    )
    return z_s, slope, z_t


@triton.jit
def _online(z_s, z_t, m_s, x_s, m_t, x_t, moment, MOMENT):
    """Fold one block into every lane's running statistics."""
    n_s, n_t = tl.maximum(m_s, z_s), tl.maximum(m_t, z_t)
    above_s, above_t = z_s > m_s, z_t > m_t
    # What moves the sum to a new maximum, or else what the logit adds to it; the other one is 1.
    a_s, a_t = tl.exp(-tl.abs(z_s - m_s)), tl.exp(-tl.abs(z_t - m_t))
    if MOMENT:
        move_s, e_s = tl.where(above_s, a_s, 1.0), tl.where(above_s, 1.0, a_s)
        moved = move_s * (moment + (1 + x_s) * ((m_s - m_t) - (n_s - n_t)))
        gap = (z_s - n_s) - (z_t - n_t)
        # Guarded: 0 · inf is not a number, and a term of weight 0 counts for nothing.
        moment = tl.where(move_s > 0, moved, 0.0) + tl.where(e_s > 0, e_s * gap, 0.0)
    x_s = tl.where(above_s, (1 + x_s) * a_s, x_s + a_s)
    x_t = tl.where(above_t, (1 + x_t) * a_t, x_t + a_t)
    return n_s, x_s, n_t, x_t, moment


@triton.jit
def _merged(m, x, lanes):
    """Maximum over all lanes, its distance from each, and log Σ e^{z − max}."""
    top, where = tl.max(m, axis=0), tl.argmax(m, axis=0)
    move = tl.exp(m - top)
    excess = tl.sum(tl.where(lanes == where, x, (1 + x) * move), axis=0)
    return top, move, log1p(excess)


@triton.jit
def _log_mixture(r, beta, log_beta):
    """u = log m − log p_s of m = (1 − β) p_s + β p_t, with r = log p_s − log p_t."""
    near = log1p(beta * expm1(tl.minimum(-r, 60.0)))
    return tl.where(-r > 60.0, log_beta - r, near)


@triton.jit
def _probabilities(d_s, d_t, log_s, log_t, gap):
    """p_s, p_t, log p_s and r = log p_s − log p_t from logits relative to their maxima."""
    log_p_s = d_s - log_s
    p_s, p_t = tl.exp(log_p_s), tl.exp(d_t - log_t)
    r = (d_s - d_t) - gap
    return p_s, p_t, log_p_s, tl.where((p_s == 0) & (p_t == 0), 0.0, r)


@triton.jit
def _forward_terms(p_s, p_t, r):
    """What an entry adds to the forward KL, and p_s − p_t, from the reverse KL's one series."""
    near = tl.abs(r) < 0.5
    reverse = kl_terms(p_s, p_t, r)  # p_t − p_s + p_s r
    apart = tl.where(near, p_s * r - reverse, p_s - p_t)
    far = p_s - p_t - tl.where(p_t > 0, p_t * r, 0.0)
    return tl.where(near, r * apart - reverse, far), apart


@triton.jit
def divergence_rows_kernel(
    zs_ptr,  # (C, width) fp32 logits of the student, without bias; −inf from column V on
    zt_ptr,  # (C, width) fp32 logits of the teacher, likewise
    dz_ptr,  # (C, width) the gradient; in fp32 it may be over the student's logits
    bs_ptr,  # (V,) biases; read where BIAS_S, BIAS_T
    bt_ptr,
    factors_ptr,  # (C,) fp32; 0 drops the row, unless its target has a factor
    shares_ptr,  # (C,) fp32, of a mixture's forward KL
    targets_ptr,  # (C,) int64; this, the next and logprobs where TARGETS
    target_factors_ptr,  # (C,) fp32
    value_ptr,  # (C,) fp32
    entropy_ptr,  # (C,) fp32
    reverse_ptr,  # (C,) fp32, both of a mixture
    forward_ptr,
    logprobs_ptr,  # (C,) fp32
    stride_dz,
    V,
    width,  # stride of the logits: V rounded up, so that no mask cuts through a 16-byte access
    beta,
    rest,  # 1 − β
    softcap_s,
    softcap_t,
    inv_temperature,
    DIVERGENCE: tl.constexpr,
    BIAS_S: tl.constexpr,
    BIAS_T: tl.constexpr,
    SOFTCAP_S: tl.constexpr,
    SOFTCAP_T: tl.constexpr,
    TARGETS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0)
    offset = row.to(tl.int64)  # times the width of a row it passes 2³¹
    zs_ptr += offset * width
    zt_ptr += offset * width
    dz_ptr += offset * stride_dz
    factor = tl.load(factors_ptr + row)
    dropped = factor == 0
    if TARGETS:
        target = tl.load(targets_ptr + row).to(tl.int32)
        target_factor = tl.load(target_factors_ptr + row)
        dropped = tl.where(dropped, target_factor == 0, False)
    if DIVERGENCE == MIXTURE:
        share = tl.load(shares_ptr + row)
    end = tl.where(dropped, 0, width)
    lanes = tl.arange(0, BLOCK_V)

    # First pass: statistics, lane by lane.
    MOMENT: tl.constexpr = GRADIENT and DIVERGENCE != FORWARD_KL and DIVERGENCE != JSD
    m_s = tl.full([BLOCK_V], LOWEST, tl.float32)
    m_t = tl.full([BLOCK_V], LOWEST, tl.float32)
    x_s = tl.full([BLOCK_V], -1.0, tl.float32)  # Σ e^{z − max} − 1; of nothing it is −1
    x_t = tl.full([BLOCK_V], -1.0, tl.float32)
    moment = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, end, BLOCK_V):
        v = start + lanes
        z_s, _, z_t = _both(
            zs_ptr, zt_ptr, bs_ptr, bt_ptr, v, width, V, softcap_s, softcap_t, inv_temperature,
            BIAS_S, BIAS_T, SOFTCAP_S, SOFTCAP_T,
        )  # fmt: skip
        m_s, x_s, m_t, x_t, moment = _online(z_s, z_t, m_s, x_s, m_t, x_t, moment, MOMENT)

    # The lanes merge.
    max_s, move_s, log_s = _merged(m_s, x_s, lanes)
    max_t, _, log_t = _merged(m_t, x_t, lanes)
    gap = log_s - log_t  # of the normalisers, each relative to its maximum
    center = 0.0  # of the gradient, its mean under the student
    log_beta = tl.log(beta)
    if MOMENT:
        moment = move_s * (moment + (1 + x_s) * ((m_s - m_t) - (max_s - max_t)))
        center = tl.sum(tl.where(move_s > 0, moment, 0.0), axis=0) * tl.exp(-log_s) - gap
    if GRADIENT and DIVERGENCE == JSD:
        terms = tl.zeros([BLOCK_V], tl.float32)
        for start in range(0, end, BLOCK_V):
            v = start + lanes
            z_s, _, z_t = _both(
                zs_ptr, zt_ptr, bs_ptr, bt_ptr, v, width, V, softcap_s, softcap_t, inv_temperature,
                BIAS_S, BIAS_T, SOFTCAP_S, SOFTCAP_T,
            )  # fmt: skip
            p_s, _, _, r = _probabilities(z_s - max_s, z_t - max_t, log_s, log_t, gap)
            terms += tl.where(p_s > 0, p_s * _log_mixture(r, beta, log_beta), 0.0)
        center = tl.sum(terms, axis=0)

    # Beyond V: what a next block's logits need, or what a product may touch.
    WIDE: tl.constexpr = dz_ptr.dtype.element_ty == tl.float32
    BEYOND: tl.constexpr = float("-inf") if WIDE else 0.0
    if TARGETS:  # before the gradient lies over it
        z, _ = _logits(
            zs_ptr, bs_ptr, target, width, V, softcap_s, inv_temperature, BIAS_S, SOFTCAP_S
        )
        tl.store(logprobs_ptr + row, tl.where(dropped, 0.0, (z - max_s) - log_s))
        tl.debug_barrier()  # of all warps, whichever stores its part of the gradient first

    # Last pass: divergence, entropy, gradient.
    value = tl.zeros([BLOCK_V], tl.float32)
    forward = tl.zeros([BLOCK_V], tl.float32)
    entropy = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, end, BLOCK_V):
        v = start + lanes
        z_s, slope, z_t = _both(
            zs_ptr, zt_ptr, bs_ptr, bt_ptr, v, width, V, softcap_s, softcap_t, inv_temperature,
            BIAS_S, BIAS_T, SOFTCAP_S, SOFTCAP_T,
        )  # fmt: skip
        p_s, p_t, log_p_s, r = _probabilities(z_s - max_s, z_t - max_t, log_s, log_t, gap)
        entropy -= tl.where(p_s > 0, p_s * log_p_s, 0.0)
        if DIVERGENCE == REVERSE_KL:
            value += kl_terms(p_s, p_t, r)
            dz = tl.where(p_s > 0, p_s * (r - center), 0.0)
        elif DIVERGENCE == FORWARD_KL:
            terms, dz = _forward_terms(p_s, p_t, r)
            value += terms
        elif DIVERGENCE == MIXTURE:
            value += kl_terms(p_s, p_t, r)
            terms, apart = _forward_terms(p_s, p_t, r)
            forward += terms
            # Of the reverse KL no part, where it may be infinite.
            reverse = tl.where(p_s > 0, p_s * (r - center) * (1 - share), 0.0)
            dz = tl.where(share < 1, reverse, 0.0) + apart * share
        else:
            u = _log_mixture(r, beta, log_beta)
            p_m = rest * p_s + beta * p_t
            value += rest * kl_terms(p_s, p_m, -u)
            # log p_t − log m, of an entry that only the teacher has −log β
            of_t = tl.where(p_s > 0, -(r + u), -log_beta)
            value += beta * kl_terms(p_t, p_m, of_t)
            dz = tl.where(p_s > 0, rest * p_s * (center - u), 0.0)
        if GRADIENT:
            if TARGETS:
                dz = tl.where(factor == 0, 0.0, dz) * factor
                dz = (dz + tl.where(v == target, p_s - 1, p_s) * target_factor) * slope
            else:
                dz = dz * slope * factor
            dz = tl.where(v < V, dz, BEYOND)
            tl.store(dz_ptr + v, rounded(dz, dz_ptr.dtype.element_ty), mask=v < width)
    found = tl.sum(value, axis=0)
    if DIVERGENCE == MIXTURE:
        found_forward = tl.sum(forward, axis=0)
        tl.store(reverse_ptr + row, tl.where(factor == 0, 0.0, found))
        tl.store(forward_ptr + row, tl.where(factor == 0, 0.0, found_forward))
        found = tl.where(share < 1, (1 - share) * found, 0.0)
        found += tl.where(share > 0, share * found_forward, 0.0)
    tl.store(value_ptr + row, tl.where(factor == 0, 0.0, found))
    tl.store(entropy_ptr + row, tl.sum(entropy, axis=0))
    if GRADIENT:
        for start in range(0, tl.where(dropped, width, 0), BLOCK_V):
            v = start + lanes
            nothing = tl.where(v < V, 0.0, BEYOND)
            tl.store(dz_ptr + v, nothing.to(dz_ptr.dtype.element_ty), mask=v < width)


def row_width(v: int) -> int:
    """Columns of a row, V of them used: no mask cuts through a 16-byte access."""
    return -(-v // 64) * 64


def divergence_rows_(
    student_logits: Tensor,  # (C, V) fp32 without bias
    teacher_logits: Tensor,  # (C, V) of the same strides
    student_bias: Tensor | None,  # (V,)
    teacher_bias: Tensor | None,  # (V,)
    rows: Rows,
    found: Found,  # filled; its dz is the student's logits, or memory of its own as wide
    options: Options,
    need_grad: bool,
) -> None:
    """One launch. Rows are `row_width` wide, logits −inf from column V on."""
    c, v = student_logits.shape
    width = row_width(v)
    target_factors = rows.target_factors
    if target_factors is None and rows.target_ids is not None:
        target_factors = torch.zeros_like(rows.factors)
    kind = options.divergence
    if kind == "none":  # any, from the student to itself; no factor asks for its gradient
        kind, teacher_logits, teacher_bias = "forward_kl", student_logits, student_bias
        options = options._replace(teacher_softcap=options.student_softcap)
    here = contextlib.nullcontext() if INTERPRETED else torch.cuda.device_of(student_logits)
    with here:
        divergence_rows_kernel[(c,)](
            student_logits,
            teacher_logits,
            found.dz,
            student_bias,
            teacher_bias,
            rows.factors,
            rows.forward_shares,
            rows.target_ids,
            target_factors,
            found.per_token,
            found.entropy,
            found.reverse_kl,
            found.forward_kl,
            found.logprobs,
            found.dz.stride(0),
            v,
            width,
            options.beta,
            1 - options.beta,
            options.student_softcap or 1.0,
            options.teacher_softcap or 1.0,
            1 / options.temperature,
            DIVERGENCE=KINDS.index(kind),
            BIAS_S=student_bias is not None,
            BIAS_T=teacher_bias is not None,
            SOFTCAP_S=options.student_softcap is not None,
            SOFTCAP_T=options.teacher_softcap is not None,
            TARGETS=rows.target_ids is not None,
            GRADIENT=need_grad,
            BLOCK_V=BLOCK_V,
            num_warps=THREADS // (64 if torch.version.hip else 32),
            enable_fp_fusion=FUSED,
        )
