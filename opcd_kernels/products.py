"""The matrix products of the loss: operands in the inputs' precision, sums kept in fp32.

Student and teacher are nearly equal during distillation, so the difference of their logits cancels
and logits rounded to bf16 would leave noise. A GPU multiplies 16-bit operands into fp32 outputs
directly. Elsewhere a product returns the dtype of its operands, so they are widened to fp32, the
head one tile at a time. For bf16 such products go to oneDNN with leave to round their operands to
bf16: nothing is lost where they came from bf16, processors that multiply bf16 (AMX) use it, and on
others oneDNN's fp32 kernels may still be the faster ones (`make bench`: plain-fp32-onednn).
fp64 operands are multiplied and summed in fp64.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

_TILE_BYTES = 16 * 2**20  # of a widened head: small enough for a CPU's last cache
_SETTING = threading.Lock()  # of oneDNN's precision, which is one for the whole process


class Products(Protocol):
    """C tokens of a chunk, V rows of a head, D hidden; `dz` is the gradient in the logits."""

    dtype: torch.dtype  # of the operands

    def head(self, weight: Tensor) -> Tensor:
        """The head as the other methods take it; once a call."""

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """out (C, V) = hidden (C, D) @ weightᵀ."""

    def grad_hidden(
        self, dz: Tensor, weight: Tensor, dtype: torch.dtype, scratch: Tensor
    ) -> Tensor:
        """dz (C, V) @ weight (V, D), rounded to `dtype` once. Scratch may be overwritten."""

    def grad_weight_(self, out: Tensor, dz: Tensor, hidden: Tensor, add: bool) -> None:
        """out (V, D) = dz (C, V)ᵀ @ hidden (C, D), or += where `add`."""


def products_for(device: torch.device, dtype: torch.dtype) -> Products:
    """Products on `device` with operands in `dtype`."""
    return GpuProducts(dtype) if device.type == "cuda" else WideProducts(dtype)


def tile_bytes(weight: Tensor, itemsize: int) -> int:
    """Memory of the part of a head that `WideProducts` widens at a time."""
    if weight.dtype.itemsize == itemsize:
        return 0
    row = weight.shape[1] * itemsize
    return min(max(1, _TILE_BYTES // row), len(weight)) * row


class GpuProducts:
    """CUDA and ROCm: operands in `dtype`, dz among them; the library sums and writes fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def head(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        self._mm(hidden.to(self.dtype), weight.T, out)

    def grad_hidden(
        self, dz: Tensor, weight: Tensor, dtype: torch.dtype, scratch: Tensor
    ) -> Tensor:
        # Into fp32 also for a 16-bit result, whose partial sums would be rounded too.
        wide = torch.promote_types(dz.dtype, torch.float32)
        return self._mm(dz, weight, dz.new_empty(len(dz), weight.shape[1], dtype=wide)).to(dtype)

    def grad_weight_(self, out: Tensor, dz: Tensor, hidden: Tensor, add: bool) -> None:
        dz_t, hidden = dz.T, hidden.to(self.dtype)
        if not add:
            self._mm(dz_t, hidden, out)
        elif out.dtype == self.dtype:
            out.addmm_(dz_t, hidden)
        else:
            torch.addmm(out, dz_t, hidden, out_dtype=out.dtype, out=out)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if out.dtype == self.dtype:
            return torch.mm(a, b, out=out)
        return torch.mm(a, b, out_dtype=out.dtype, out=out)


class WideProducts:
    """CPUs and other devices: operands are widened to fp32, or left in fp64."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32

    def head(self, weight: Tensor) -> Tensor:
        return weight

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        hidden = hidden.to(self.wide)
        with self._rounding():
            for rows, tile in self._tiles(weight):
                torch.mm(hidden, tile.T, out=out[:, rows])

    def grad_hidden(
        self, dz: Tensor, weight: Tensor, dtype: torch.dtype, scratch: Tensor
    ) -> Tensor:
        if dtype == weight.dtype == torch.bfloat16:  # sums are fp32 inside, and nothing is widened
            # Packed: oneDNN on AMX also multiplies what lies between the end of a strided row and
            # the next multiple of 32 columns, and 0 · NaN is NaN.
            if dz.dtype == dtype or 2 * scratch.numel() < dz.numel():
                return dz.to(dtype).contiguous() @ weight
            packed = scratch.view(dtype).as_strided(dz.shape, (dz.shape[1], 1))
            return packed.copy_(dz) @ weight
        dz = dz.to(self.wide)
        out = dz.new_zeros(len(dz), weight.shape[1])
        with self._rounding():
            for rows, tile in self._tiles(weight):
                out.addmm_(dz[:, rows], tile)
        return out.to(dtype)

    def grad_weight_(self, out: Tensor, dz: Tensor, hidden: Tensor, add: bool) -> None:
        dz_t, hidden = dz.to(self.wide).T, hidden.to(self.wide)
        with self._rounding():
            if add:
                out.addmm_(dz_t, hidden)
            else:
                torch.mm(dz_t, hidden, out=out)

    def _tiles(self, weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
        if weight.dtype == self.wide:
            yield slice(None), weight
            return
        rows = max(1, _TILE_BYTES // (weight.shape[1] * self.wide.itemsize))
        buffer = weight.new_empty(min(rows, len(weight)), weight.shape[1], dtype=self.wide)
        for start in range(0, len(weight), rows):
            part = weight[start : start + rows]
            yield slice(start, start + rows), buffer[: len(part)].copy_(part)

    @contextlib.contextmanager
    def _rounding(self) -> Iterator[None]:
        """For bf16: products go to oneDNN, which may round their operands to bf16."""
        matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
        if self.dtype != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
            yield
            return
        with _SETTING:
            before = matmul.fp32_precision
            matmul.fp32_precision = "bf16"
            try:
                yield
            finally:
                matmul.fp32_precision = before
