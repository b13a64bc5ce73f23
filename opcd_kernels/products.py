"""The matrix products of the loss: operands in the inputs' precision, sums kept in fp32.

Student and teacher are nearly equal during distillation, so the difference of their logits cancels
and logits rounded to bf16 would leave noise. A GPU multiplies 16-bit operands into fp32 outputs
directly. Elsewhere a product returns the dtype of its operands, so they are widened to fp32, the
head one tile at a time; and oneDNN is told to multiply fp32 operands in bf16 where bf16 was asked
for, which loses nothing where they came from bf16 and takes a third of the time.
fp64 operands are multiplied and summed in fp64.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

_TILE_BYTES = 16 * 2**20  # of a widened head: small enough for a CPU's last cache


class Products(Protocol):
    """C tokens of a chunk, V rows of a head, D hidden; `dz` is the gradient in the logits."""

    def head(self, weight: Tensor) -> Tensor:
        """The head as the other methods take it; once a call."""

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """out (C, V) = hidden (C, D) @ weightᵀ."""

    def grad_hidden(
        self, dz: Tensor, weight: Tensor, dtype: torch.dtype, scratch: Tensor
    ) -> Tensor:
        """dz (C, V) @ weight (V, D), rounded to `dtype` once. Scratch (C, V) may be overwritten."""

    def grad_weight_(
        self, out: Tensor, dz: Tensor, hidden: Tensor, add: bool, scratch: Tensor
    ) -> None:
        """out (V, D) = dz (C, V)ᵀ @ hidden (C, D), or += where `add`."""


def products_for(device: torch.device, dtype: torch.dtype) -> Products:
    """Products on `device` with operands in `dtype`."""
    return GpuProducts(dtype) if device.type == "cuda" else WideProducts(dtype)


class GpuProducts:
    """CUDA and ROCm: the operands are rounded to `dtype`, the library sums and writes fp32."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def head(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)

    def logits_(self, out: Tensor, hidden: Tensor, weight: Tensor) -> None:
        self._mm(hidden.to(self.dtype), weight.T, out)

    def grad_hidden(
        self, dz: Tensor, weight: Tensor, dtype: torch.dtype, scratch: Tensor
    ) -> Tensor:
        dz = _rounded(dz, self.dtype, scratch)
        if dtype == self.dtype:
            return dz @ weight
        return self._mm(dz, weight, dz.new_empty(len(dz), weight.shape[1], dtype=dtype))

    def grad_weight_(
        self, out: Tensor, dz: Tensor, hidden: Tensor, add: bool, scratch: Tensor
    ) -> None:
        dz_t, hidden = _rounded(dz, self.dtype, scratch).T, hidden.to(self.dtype)
        if not add:
            self._mm(dz_t, hidden, out)
        elif out.dtype == self.dtype:
            out.addmm_(dz_t, hidden)
        else:
            torch.addmm(out, dz_t, hidden, out_dtype=out.dtype, out=out)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        if out.dtype == self.dtype:
            return torch.mm(a, b, out=out)
        if out.dtype == torch.float32:
            return torch.mm(a, b, out_dtype=out.dtype, out=out)
        return out.copy_(torch.mm(a, b))


class WideProducts:
    """CPUs and other devices: operands widened to fp32, or multiplied in bf16 by oneDNN."""

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
            return _rounded(dz, dtype, scratch) @ weight
        dz = dz.to(self.wide)
        out = dz.new_zeros(len(dz), weight.shape[1])
        with self._rounding():
            for rows, tile in self._tiles(weight):
                out.addmm_(dz[:, rows], tile)
        return out.to(dtype)

    def grad_weight_(
        self, out: Tensor, dz: Tensor, hidden: Tensor, add: bool, scratch: Tensor
    ) -> None:
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
        """Let oneDNN round fp32 operands to bf16; where it cannot, they are multiplied as is."""
        matmul: Any = getattr(torch.backends.mkldnn, "matmul", None)
        if self.dtype != torch.bfloat16 or not hasattr(matmul, "fp32_precision"):
            yield
            return
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _rounded(x: Tensor, dtype: torch.dtype, scratch: Tensor) -> Tensor:
    """x in `dtype`, which is no wider than scratch's, in the memory of scratch."""
    return x if x.dtype == dtype else scratch.view(dtype)[:, : x.shape[1]].copy_(x)
