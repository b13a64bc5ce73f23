"""How fast a machine multiplies and moves memory: measured here, and as its maker's sheet says.

What is measured is taken in the run whose times it is held against, by two operations that leave no
room for skill: one product of 4096 × 4096 matrices, and a triad a = b + s · c over arrays that no
cache holds, of which three are counted. A floor from measured rates asks what a better program
could gain on this machine as it is; one from the sheet, what the maker promises.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from opcd.models.by_name import resolve_dtype

SIDE = 4096
TRIAD_BYTES = 256 * 2**20  # of each of three arrays
ROUNDS = 5
REPEATS_ON_GPU = 10  # a round: a wait for the device costs as much as a tenth of a product


class Rates(NamedTuple):
    """A machine's speed."""

    flops: float  # floating-point operations a second: two for each product of numbers
    bytes: float  # a second, read and written


def _sheet(teraflops: float, gigabytes: float) -> Rates:
    return Rates(teraflops * 1e12, gigabytes * 1e9)


# NVIDIA's data sheets and architecture white papers: products of dense bf16 matrices with fp32
# sums at boost clock, memory bandwidth; by the name that torch.cuda.get_device_name gives.
SHEETS = {
    "NVIDIA A100-PCIE-40GB": _sheet(312, 1555),
    "NVIDIA A100-SXM4-40GB": _sheet(312, 1555),
    "NVIDIA A100 80GB PCIe": _sheet(312, 1935),
    "NVIDIA A100-SXM4-80GB": _sheet(312, 2039),
    "NVIDIA A10": _sheet(125, 600),
    "NVIDIA L4": _sheet(121, 300),
    "NVIDIA L40S": _sheet(362, 864),
    "NVIDIA H100 PCIe": _sheet(756, 2000),
    "NVIDIA H100 80GB HBM3": _sheet(989, 3350),
    "NVIDIA H200": _sheet(989, 4800),
    "NVIDIA B200": _sheet(2250, 8000),
    "NVIDIA GeForce RTX 3090": _sheet(71, 936),
    "NVIDIA GeForce RTX 4090": _sheet(165, 1008),
    "NVIDIA GeForce RTX 5090": _sheet(209, 1792),
}


def sheet(device: torch.device) -> Rates | None:
    """What the maker says; None for a CPU, and a GPU that is not in the table."""
    if device.type != "cuda":
        return None
    return SHEETS.get(torch.cuda.get_device_name(device))


@functools.cache
def measured(device: torch.device) -> Rates:
    """What this device does now, in the dtype that a run takes; a second or two."""
    dtype = resolve_dtype("auto", device)
    a, b = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = _seconds(device, lambda: torch.mm(a, b, out=out))
    x, y, z = (torch.ones(TRIAD_BYTES // 4, device=device) for _ in range(3))
    triad = _seconds(device, lambda: torch.add(x, y, alpha=0.5, out=z))
    return Rates(2 * SIDE**3 / product, 3 * TRIAD_BYTES / triad)


def _seconds(device: torch.device, call: Callable[[], object]) -> float:
    """Of one call: the median of a few rounds, behind one that is not counted."""
    repeats = REPEATS_ON_GPU if device.type == "cuda" else 1
    times = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append((time.perf_counter() - start) / repeats)
    return statistics.median(times[1:])
