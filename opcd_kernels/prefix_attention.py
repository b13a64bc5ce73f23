"""Attention of packed sequences behind shared prefixes: a Triton forward kernel.

One program takes BLOCK_M query rows of one sequence and one key head: the group of query heads
that share the key lie side by side in the rows, so that keys and values are read once for all of
them. It walks the prefix and then the sequence's own keys in a single online softmax: nothing is
merged afterwards, and no score leaves the chip.

    position of query i of a sequence   S + i, counted from the first kept prefix token
    it sees key position j              j ≤ S + i and, in a window, j > S + i − window
    score                               scale · q·k, then softcap · tanh(score / softcap)
    sink                                one more score in the denominator that brings no value

Numerics: scores, maxima and sums in fp32; products take the inputs' dtype, probabilities are
rounded to it before they meet the values, as in FlashAttention.
"""
# mypy: disallow-untyped-defs=False

import contextlib
import os

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# As Triton reads it, on decoration.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a finite start for the maximum: −inf − −inf is not a number


@triton.jit
def _tanh(x):
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)


@triton.jit
def _dot(a, b):
    if INTERPRETED:  # the interpreter multiplies the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _walk(
    q, acc, m, total, k_ptr, v_ptr, stride_k, stride_v, first, end, shift,
    position, scale, window, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Fold keys first … end − 1, key n at position n + shift, into the running softmax."""
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    for start in range(first, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
        inside = mask_n[:, None] & mask_d[None, :]
        # The block's own offset is 64 bits wide: of a long row it passes 2³¹.
        at, in_block = tl.cast(start, tl.int64), tl.arange(0, BLOCK_N)[:, None]
        k_block, v_block = k_ptr + at * stride_k, v_ptr + at * stride_v
        k = tl.load(k_block + in_block * stride_k + offs_d[None, :], mask=inside, other=0.0)
        v = tl.load(v_block + in_block * stride_v + offs_d[None, :], mask=inside, other=0.0)
        score = _dot(q, tl.trans(k)) * scale
        if SOFTCAP:
            score = softcap * _tanh(score / softcap)
        distance = position[:, None] - (offs_n + shift)[None, :]
        visible = mask_n[None, :]
        if MASKED:
            visible = visible & (distance >= 0)
        if WINDOW:
            visible = visible & (distance < window)
        score = tl.where(visible, score * LOG2E, float("-inf"))
        new = tl.maximum(m, tl.max(score, axis=1))
        p = tl.exp2(score - new[:, None])
        move = tl.exp2(m - new)
        total = total * move + tl.sum(p, axis=1)
        acc = acc * move[:, None] + _dot(p.to(v.dtype), v)
        m = new
    return acc, m, total


@triton.jit
def prefix_attention_kernel(
    q_ptr, k_ptr, v_ptr, prefix_k_ptr, prefix_v_ptr, sinks_ptr, out_ptr,
    cu_seqlens_ptr,  # (B + 1,) int32
    prefix_bounds_ptr,  # (B, 2) int32
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh,
    stride_pkh, stride_pks, stride_pvh, stride_pvs,
    scale, window, softcap,
    G: tl.constexpr, D: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    tile, kv_head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(cu_seqlens_ptr + sequence).to(tl.int64)
    length = tl.load(cu_seqlens_ptr + sequence + 1).to(tl.int64) - begin
    low = tile * BLOCK_Q
    if low >= length:
        return
    prefix_begin = tl.load(prefix_bounds_ptr + 2 * sequence)
    S = tl.load(prefix_bounds_ptr + 2 * sequence + 1) - prefix_begin
    # Rows: query position major, head of the group minor.
    rows = tl.arange(0, BLOCK_Q * BLOCK_G)
    i, g = low + rows // BLOCK_G, rows % BLOCK_G
    mask_m = (i < length) & (g < G)
    head = kv_head * G + g
    offs_d = tl.arange(0, BLOCK_D)
    inside = mask_m[:, None] & (offs_d < D)[None, :]
    offs_q = (begin + i) * stride_qn + head * stride_qh
    q = tl.load(q_ptr + offs_q[:, None] + offs_d[None, :], mask=inside, other=0.0)

    position = S + i
    m = tl.full([BLOCK_Q * BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_Q * BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_Q * BLOCK_G, BLOCK_D], tl.float32)
    # The first key that the tile's first row can see, in blocks.
    first, first_own = 0, 0
    if WINDOW:
        first = tl.maximum(S + low - window + 1, 0) // BLOCK_N * BLOCK_N
        first_own = tl.maximum(low - window + 1, 0) // BLOCK_N * BLOCK_N
    acc, m, total = _walk(
        q, acc, m, total,
        prefix_k_ptr + kv_head.to(tl.int64) * stride_pkh + prefix_begin.to(tl.int64) * stride_pks,
        prefix_v_ptr + kv_head.to(tl.int64) * stride_pvh + prefix_begin.to(tl.int64) * stride_pvs,
        stride_pks, stride_pvs, first, S, 0, position, scale, window, softcap,
        D, BLOCK_D, BLOCK_N, False, WINDOW, SOFTCAP,
    )  # fmt: skip
    end = tl.minimum(low + BLOCK_Q, length).to(tl.int32)
    acc, m, total = _walk(
        q, acc, m, total,
        k_ptr + begin * stride_kn + kv_head * stride_kh,
        v_ptr + begin * stride_vn + kv_head * stride_vh,
        stride_kn, stride_vn, first_own, end, S, position, scale, window, softcap,
        D, BLOCK_D, BLOCK_N, True, WINDOW, SOFTCAP,
    )  # fmt: skip
    if SINKS:
        sink = tl.load(sinks_ptr + head, mask=mask_m, other=0.0).to(tl.float32) * LOG2E
        new = tl.maximum(m, sink)
        move = tl.exp2(m - new)
        acc = acc * move[:, None]
        total = total * move + tl.exp2(sink - new)
    total = tl.where(mask_m, total, 1.0)
    offs_o = ((begin + i) * (tl.num_programs(1) * G) + head) * D
    out = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offs_o[:, None] + offs_d[None, :], out, mask=inside)


def prefix_attention_triton(
    query: Tensor,  # (N, H, D), packed
    key: Tensor,  # (N, H_kv, D)
    value: Tensor,  # (N, H_kv, D)
    prefix_key: Tensor,  # (H_kv, Σ S, D): the last S tokens of each prefix; S may be 0
    prefix_value: Tensor,  # (H_kv, Σ S, D)
    prefix_bounds: Tensor,  # (B, 2) int32, where each sequence's prefix begins and ends in them
    cu_seqlens: Tensor,  # (B + 1,) int32, where each sequence's rows start
    longest: int,  # sequence; known on the host, so that nobody waits for cu_seqlens
    scale: float,
    window: int | None = None,  # a query sees this many positions, itself included
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (H,)
) -> Tensor:  # (N, H, D)
    """Attention of each token to its prefix and to its own sequence up to itself; forward only.

    Raises ValueError for values of another width than the keys, or of more than 256.
    """
    n, heads, width = query.shape
    kv_heads = key.shape[1]
    if value.shape[-1] != width or width > 256:
        raise ValueError(
            f"query, key and value must be equally wide, at most 256, got {width} and "
            f"{value.shape[-1]}; use another attention"
        )
    query, key, value, prefix_key, prefix_value = (
        x if x.stride(-1) == 1 else x.contiguous()
        for x in (query, key, value, prefix_key, prefix_value)
    )
    if isinstance(query, FakeTensor):  # there are no numbers: what it takes alone is asked for
        return query.new_empty(n, heads, width)
    out = torch.empty(n, heads, width, dtype=query.dtype, device=query.device)
    block_d = max(16, triton.next_power_of_2(width))
    block_g = triton.next_power_of_2(heads // kv_heads)
    block_q, block_n, warps, stages = tile(block_g, block_d, query.element_size())
    grid = (triton.cdiv(longest, block_q), kv_heads, len(cu_seqlens) - 1)
    here = contextlib.nullcontext() if INTERPRETED.value else torch.cuda.device_of(query)
    with here:
        prefix_attention_kernel[grid](
            query, key, value, prefix_key, prefix_value, sinks, out,
            cu_seqlens, prefix_bounds,
            query.stride(0), query.stride(1), key.stride(0), key.stride(1),
            value.stride(0), value.stride(1), prefix_key.stride(0), prefix_key.stride(1),
            prefix_value.stride(0), prefix_value.stride(1),
            scale, window or 0, softcap or 1.0,
            G=heads // kv_heads, D=width, BLOCK_G=block_g, BLOCK_D=block_d,
            BLOCK_Q=block_q, BLOCK_N=block_n,
            WINDOW=window is not None, SOFTCAP=softcap is not None, SINKS=sinks is not None,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


def tile(block_g: int, block_d: int, itemsize: int) -> tuple[int, int, int, int]:
    """BLOCK_Q, BLOCK_N, warps, stages: 128 rows where registers allow it, else 64."""
    narrow = block_d <= 128 and itemsize == 2
    return max(1, (128 if narrow else 64) // block_g), 64 if narrow else 32, 8, 2
