"""Who computes the loss: what a backend can do, and which one "auto" means.

    torch         library products, PyTorch over the rows of logits: everywhere
    triton        library products, one Triton kernel over the rows
    triton_dual   one Triton kernel multiplies both models and keeps the logits on the chip: bf16,
                  a divergence alone (no bias, softcap, mixture, targets), compute capability 9.0 or
                  later

Which of the last two is faster depends on shape and device. `python -m opcd_kernels.tune` measures
it where it stands (`tuned.py`), and `measured_designs.json` holds what `make bench` found, a row a
device and shape, with the seconds of both (`python -m benchmarks.designs` writes it). "auto" takes
the winner at the nearest shape of the first, or of the second, and "triton" on a device that is in
neither.
"""

import functools
import importlib.util
import json
from importlib import resources
from typing import Any

import torch

from opcd_kernels import tuned

BACKENDS = ("auto", "torch", "triton", "triton_dual")
DESIGNS = BACKENDS[2:]

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def check_backend(
    backend: str, device: torch.device, compute_dtype: torch.dtype, plain: bool
) -> None:
    """Raise ValueError where a backend that was named cannot do what is asked of it.

    `plain`: there is no bias, softcap, mixture of divergences or target.
    """
    if backend in DESIGNS and not _runs_triton(device, compute_dtype):
        raise ValueError(
            f"backend '{backend}' must have tensors on a GPU, in bf16, fp16 or fp32, got "
            f"{compute_dtype} on {device}; pass backend='torch' or 'auto'"
        )
    if backend == "triton_dual" and not _suits_dual(device, compute_dtype, plain):
        raise ValueError(
            "backend 'triton_dual' must have bf16 (inputs or autocast), no bias, softcap, "
            "forward_share between 0 and 1 or target_ids, and a GPU of compute capability 9.0 or "
            f"later, got {compute_dtype}{'' if plain else ' with one of these'} on {device}; pass "
            "backend='triton' or 'auto'"
        )


def chosen_backend(
    device: torch.device, compute_dtype: torch.dtype, plain: bool, shape: tuple[int, int], head: str
) -> str:
    """What "auto" means for a head of `shape` (V, D), "trained" or "frozen" (see `fastest`)."""
    if device.type != "cuda" or not _runs_triton(device, compute_dtype):
        return "torch"
    if not _suits_dual(device, compute_dtype, plain):
        return "triton"
    rows = tuned.rows_on(device) or measurements()
    return fastest(rows, torch.cuda.get_device_name(device), shape, head)


def _runs_triton(device: torch.device, compute_dtype: torch.dtype) -> bool:
    if not _HAS_TRITON or compute_dtype == torch.float64:
        return False
    return device.type == "cuda" or (device.type == "cpu" and _interpreting())


def _interpreting() -> bool:
    """Triton's interpreter runs the kernels on a CPU (TRITON_INTERPRET=1), slowly: for tests."""
    from opcd_kernels import terms_triton

    return terms_triton.INTERPRETED


def _suits_dual(device: torch.device, compute_dtype: torch.dtype, plain: bool) -> bool:
    if compute_dtype != torch.bfloat16 or not plain:
        return False
    if device.type == "cpu":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.cache
def measurements() -> tuple[dict[str, Any], ...]:
    """Rows of device, D, V, head and the seconds of each design."""
    file = resources.files("opcd_kernels").joinpath("measured_designs.json")
    return tuple(json.loads(file.read_text(encoding="utf-8")))


def fastest(
    rows: tuple[dict[str, Any], ...], device: str, shape: tuple[int, int], head: str
) -> str:
    """The faster design at the nearest measured (V, D) of this device.

    `head` is "trained" (two matrices, four products) or "frozen" (one for both models, three).
    """
    own = tuple(row for row in rows if row["device"] == device)
    row = tuned.nearest(own, shape, head)
    return min(row["seconds"], key=row["seconds"].__getitem__) if row else "triton"
