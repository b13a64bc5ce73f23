"""How many tokens at a time: arithmetic of bytes.

Two things are held, of as many tokens as pay. A *block* is the tokens whose logits are there, of
both models and in fp32: a product that writes them reads the head once a block, under its own
multiplication, so a few hundred tokens suffice. A *chunk*, several blocks, is the tokens whose
gradient in the logits is there, in the precision of the products: it is multiplied into the head's
gradient at once, and that fp32 matrix is read and written once a chunk, which nothing hides, so
there should be thousands (docs/derivation.md, "Why two sizes").

A GPU holds max(3 %, min(5 %, 1.3 GB)) of its memory, other devices 128 MiB, where block and chunk
are one: a head in bf16 is widened there once a block.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from opcd_kernels.products import tile_bytes
from opcd_kernels.rows_torch import work_bytes

_CPU_BYTES = 128 * 2**20
_BLOCK = 256, 512  # tokens, at least and at most
_DUAL_STATISTICS = 6 * 4 / 128  # bytes an entry: six fp32 numbers a tile


class Sizes(NamedTuple):
    """Tokens."""

    chunk: int  # whose gradient in the logits is there at once
    block: int  # whose logits are, no more than a chunk


class Entry(NamedTuple):
    """Bytes of a token and vocabulary entry."""

    logits: float  # of a block
    gradient: float  # of a chunk

    def bytes(self, sizes: Sizes, vocab_size: int) -> int:
        return int(vocab_size * (sizes.block * self.logits + sizes.chunk * self.gradient))


def gradient_dtype(backend: str, device: torch.device, compute_dtype: torch.dtype) -> torch.dtype:
    """Of the gradient in the logits: that of the products' operands, to which a CPU's products
    round it themselves."""
    if backend == "torch" and device.type != "cuda":
        return torch.promote_types(compute_dtype, torch.float32)
    return compute_dtype


def entry(backend: str, device: torch.device, compute_dtype: torch.dtype) -> Entry:
    """What a backend holds; a gradient as wide as the logits lies over the student's."""
    if backend == "triton_dual":
        return Entry(0, 4 + _DUAL_STATISTICS)
    wide = torch.promote_types(compute_dtype, torch.float32).itemsize
    gradient = gradient_dtype(backend, device, compute_dtype).itemsize
    return Entry(wide if gradient == wide else 2 * wide, gradient)


def gpu_bytes(total: int) -> int:
    """What the loss holds of a GPU with so much memory, beside the gradients that it returns."""
    return int(max(0.03 * total, min(0.05 * total, 1.3e9)))


def split(budget: int, vocab_size: int, of: Entry, block: int | None = None) -> Sizes:
    """A block of a third of the bytes within its bounds, or one that is given; a chunk of the rest.

    Multiples of 128 tokens where so many fit, a chunk of whole blocks.
    """
    fit = whole(budget, vocab_size, of).chunk
    if of.logits == 0:
        return Sizes(fit, fit)
    least, most = _BLOCK
    third = _rounded_down(budget / (3 * vocab_size * of.logits))
    block = min(fit, block or max(least, min(most, third)))
    rest = budget - vocab_size * of.logits * block
    return Sizes(max(1, int(rest / (vocab_size * of.gradient) / block)) * block, block)


def whole(budget: int, vocab_size: int, of: Entry) -> Sizes:
    """A chunk that is one block."""
    fit = _rounded_down(budget / (vocab_size * (of.logits + of.gradient)))
    return Sizes(fit, fit)


def default_sizes(
    device: torch.device,
    vocab_size: int,
    compute_dtype: torch.dtype,
    backend: str,
    block: int | None = None,
) -> Sizes:
    """What fits the device's share; `block` is one that was measured to be fast there."""
    of = entry(backend, device, compute_dtype)
    if device.type != "cuda":
        return whole(_CPU_BYTES, vocab_size, of)
    total = torch.cuda.get_device_properties(device).total_memory
    return split(gpu_bytes(total), vocab_size, of, block)


def sizes_for(tokens: int, limit: Sizes, chunk_tokens: int | None = None) -> Sizes:
    """Of a call: as few chunks as the limit, or the caller's, allows, all of one size.

    Where a chunk may be several blocks, it still may where the caller names it.
    """
    block = limit.block
    if chunk_tokens is not None:
        block = min(block, chunk_tokens) if block < limit.chunk else chunk_tokens
    chunk = min(max(1, tokens), _equal(tokens, chunk_tokens or limit.chunk))
    return Sizes(chunk, min(block, chunk))


def scratch_bytes(
    tokens: int, student_weight: Tensor, teacher_weight: Tensor, compute_dtype: torch.dtype
) -> int:
    """Memory of a call in default sizes beside its inputs and its result, at most.

    Of the heads only sizes and dtypes count.
    """
    heads = student_weight, teacher_weight
    v, width, device = min(map(len, heads)), student_weight.shape[1], student_weight.device

    def held(backend: str) -> tuple[int, int]:
        """Bytes, and the tokens of a chunk."""
        limit = default_sizes(device, v, compute_dtype, backend)
        sizes = sizes_for(tokens, limit)
        return entry(backend, device, compute_dtype).bytes(sizes, v), sizes.chunk

    if device.type == "cuda":
        dual = compute_dtype == torch.bfloat16
        logits = max(held(backend)[0] for backend in ("triton", *["triton_dual"] * dual))
        copied = [w for w in heads if w.dtype != compute_dtype]
        return logits + sum(v * w.shape[1] * compute_dtype.itemsize for w in copied)
    logits, chunk = held("torch")
    wide = torch.promote_types(compute_dtype, torch.float32).itemsize
    product = 2 * chunk * width * wide + tile_bytes(student_weight, wide)
    return logits + max(work_bytes(chunk, v, wide), product)


def _equal(n: int, limit: int) -> int:
    """Tokens a chunk: as few chunks as `limit` allows, all of one size, of 128 if that fits."""
    size = -(-n // max(1, -(-n // limit)))
    rounded = -(-size // 128) * 128
    return max(1, rounded if rounded <= limit else size)


def _rounded_down(tokens: float) -> int:
    """To a multiple of 128, where that leaves any."""
    return int(tokens) // 128 * 128 if tokens >= 128 else max(1, int(tokens))
