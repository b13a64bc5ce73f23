"""The machine of a report: device, driver, versions, rates.

python -m benchmarks.gpu_facts FILE     # writes them as JSON
"""

import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.rows import origin


def driver() -> str:
    """NVIDIA's, or why it is not known."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown: no nvidia-smi"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown: {error}"
    said = (done.stdout or done.stderr).strip().splitlines()
    return said[0] if said else "unknown: nvidia-smi says nothing"


def facts() -> dict[str, Any]:
    """What a reader needs to know of the figures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[str, Any] = {**origin(), "system": platform.platform()}
    if device.type == "cuda":
        held = torch.cuda.get_device_properties(device)
        found |= {
            "capability": f"sm_{held.major}{held.minor}",
            "driver": driver(),
            "cuda": torch.version.cuda,
            "compiled_for": torch.cuda.get_arch_list(),
            "memory_mib": held.total_memory // 2**20,
            "multiprocessors": held.multi_processor_count,
            "shared_memory_bytes": getattr(held, "shared_memory_per_block_optin", None),
        }
    return found | speeds(device)


def speeds(device: torch.device) -> dict[str, Any]:
    """Measured and by the data sheet, as far as what measures them is installed."""
    try:
        from benchmarks import rates
    except ModuleNotFoundError as error:
        return {"rates": f"not measured: {error.name} is not installed"}
    here, sheet = rates.measured(device), rates.sheet(device)
    found = {
        "measured_tflops": round(here.flops / 1e12, 2),
        "measured_gbs": round(here.bytes / 1e9, 1),
    }
    if sheet is not None:
        found |= {"sheet_tflops": sheet.flops / 1e12, "sheet_gbs": sheet.bytes / 1e9}
    return found


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(facts()), encoding="utf-8")
