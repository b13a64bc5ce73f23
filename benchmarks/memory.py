"""Peak memory of one call, beyond what was held before it."""

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch


def peak_mib(device: torch.device, call: Callable[[], object]) -> float | None:
    """MiB: of PyTorch's allocator on a GPU, of the whole process on Linux; None elsewhere."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not (status.exists() and clear.exists()):
        return None

    def mib(key: str) -> float:
        (line,) = (x for x in status.read_text().splitlines() if x.startswith(key))
        return int(line.split()[1]) / 1024

    if sys.platform == "linux":  # or freed memory that the C library keeps hides what a call takes
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)
    clear.write_text("5")  # the high-water mark starts again from what is resident now
    before = mib("VmRSS")
    call()
    return mib("VmHWM") - before
