"""What a figure was made by: the code, the packages, the device."""

import hashlib
import os
import platform
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from opcd import __version__

OURS = ("opcd", "opcd_kernels")
SOURCES = {".py", ".json", ".jsonl", ".jinja", ".md", ".yaml"}
PACKAGES = ("torch", "transformers", "tokenizers", "peft", "accelerate", "safetensors", "numpy")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, a digest of opcd's own source, and the device, as files hold them."""
    return {
        "opcd": __version__,
        "code_sha256": code_digest(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "device": _device_name(device),
        "threads": torch.get_num_threads(),
    }


@lru_cache(maxsize=1)
def code_digest() -> str:
    """SHA-256 over the source of both packages as they are installed here, names included."""
    found = hashlib.sha256()
    for package in OURS:
        spec = find_spec(package)
        assert spec is not None, "both packages are installed together"
        assert spec.submodule_search_locations, "they are packages"
        folder = Path(spec.submodule_search_locations[0])
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCES and path.is_file():
                found.update(f"{package}/{path.relative_to(folder).as_posix()}\n".encode())
                found.update(path.read_bytes())
    return found.hexdigest()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"{device}: {_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8", "replace").splitlines() if cpuinfo.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
