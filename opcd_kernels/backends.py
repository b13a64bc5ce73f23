"""Who computes the loss: what a backend can do, and which one "auto" means.

    torch         library products, PyTorch over the rows of logits: everywhere
    triton        library products, one Triton kernel over the rows
    triton_dual   one Triton kernel multiplies both models and keeps the logits on the chip: bf16,
                  a divergence alone (no bias, softcap, mixture, targets), compute capability 9 or
                  10 with the shared memory of a data centre's GPU

Which of the last two is faster depends on shape and device. `python -m opcd_kernels.tune` measures
it where it stands (`tuned.py`), and `measured_designs.json` holds what `make bench` found, a row a
device and shape, with the seconds of both (`python -m benchmarks.designs` writes it). "auto" takes
the winner at the nearest shape of the first, or of the second, and "triton" on a device that is in
neither. Before "auto" uses one it has computed 64 tokens (`trial.py`); where that fails, the next
of these takes the call.
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
DUAL_CAPABILITIES = (9, 10)  # majors that its tile was made for: copy engine, wide products
DUAL_SHARED_BYTES = 229_504  # of its tile, as compiled (tests/opcd_kernels/test_compiled.py)

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
            "forward_share between 0 and 1 or target_ids, and a GPU of compute capability 9 or 10 "
            f"with {DUAL_SHARED_BYTES} bytes of shared memory a program, got "
            f"{compute_dtype}{'' if plain else ' with one of these'} on {device}; pass "
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


def and_slower(backend: str) -> tuple[str, ...]:
    """A backend, and what computes the same where it fails, in order."""
    order = ("triton_dual", "triton", "torch")
    return order[order.index(backend) :]


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
    return device.type == "cpu" or runs_dual(device)


def runs_dual(device: torch.device) -> bool:
    """Whether a GPU has what `dual_triton.py` is compiled for."""
    properties = torch.cuda.get_device_properties(device)
    # ROCm's properties lack it.
    shared = getattr(properties, "shared_memory_per_block_optin", 0)
    return fits_dual((properties.major, properties.minor), 0 if torch.version.hip else shared)


def fits_dual(capability: tuple[int, int], shared_bytes: int) -> bool:
    """Whether a GPU of that capability, with so much shared memory a program, can run it."""
    return capability[0] in DUAL_CAPABILITIES and shared_bytes >= DUAL_SHARED_BYTES


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
