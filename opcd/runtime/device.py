"""What a person is told of the device that a run takes."""

import shutil
from pathlib import Path

import torch

DRIVER = Path("/proc/driver/nvidia/version")  # on Linux, while one is loaded


def in_words(device: torch.device) -> str:
    """`cpu`, or `cuda (NVIDIA H100 80GB HBM3)`."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def unused_gpu(device: torch.device) -> str | None:
    """Why a run on the CPU cannot have the NVIDIA GPU whose driver is here.

    None where torch finds it, where there is none, and for a run on another device.
    """
    here = DRIVER.exists() or shutil.which("nvidia-smi")
    if device.type != "cpu" or torch.cuda.is_available() or not here:
        return None
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built for CPUs"
    return f"torch {torch.__version__} finds none with CUDA {torch.version.cuda} and this driver"
