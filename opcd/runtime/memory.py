"""How much memory a run has taken."""

import sys

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, of the whole process on a CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
