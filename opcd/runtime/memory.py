"""How much memory a run has taken, and how much there is."""

import ctypes
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

CGROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: of tensors on a GPU, of the whole process on a CPU (0 on Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_memory() -> None:
    """Give back what is no longer used: the C library keeps it, most of what was trained."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda _: 0)(0)


def resident_memory() -> int:
    """Bytes of this process that are in memory now; 0 where the system does not say (not Linux)."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0
    import resource

    return int(status.read_text(encoding="ascii").split()[1]) * resource.getpagesize()


class Room(NamedTuple):
    """Bytes of a machine's memory; None where nobody says."""

    total: int | None
    available: int | None


def memory_room(device: torch.device) -> Room:
    """Memory of a GPU; else of the machine, or of the control group that this process is in."""
    if device.type == "cuda":
        available, total = torch.cuda.mem_get_info(device)
        return Room(total, available)
    found = [_meminfo(), *(_group(*files) for files in _group_files())]
    totals = [room.total for room in found if room.total is not None]
    rooms = [room.available for room in found if room.available is not None]
    return Room(min(totals, default=None), min(rooms, default=None))


# Limit and use of a control group, and the folder of the outermost one, of versions 2 and 1.
_NAMES = {
    CGROUPS: ("memory.max", "memory.current", "memory.stat"),
    CGROUPS / "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat"),
}


def _group_files() -> Iterator[tuple[Path, Path, Path]]:
    """Of the group that this process is in (a job's, say) and of those around it. A container sees
    its own as the outermost one."""
    own = {root: Path() for root in _NAMES}
    if OWN_GROUPS.exists():
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, _, rest = line.partition(":")
            controllers, _, place = rest.partition(":")
            if not controllers or "memory" in controllers.split(","):
                root = CGROUPS if not controllers else CGROUPS / "memory"
                own[root] = Path(place.lstrip("/"))
    for root, path in own.items():
        for inner in (path, *path.parents):
            limit, used, stat = (root / inner / name for name in _NAMES[root])
            yield limit, used, stat


def _meminfo() -> Room:
    file = Path("/proc/meminfo")
    if not file.exists():
        return Room(None, None)
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1}
    return Room(*(1024 * kib[k] if k in kib else None for k in ("MemTotal", "MemAvailable")))


def _group(limit: Path, used: Path, stat: Path) -> Room:
    """Of a group without a limit nothing; cached files leave when there is need."""
    try:
        total = int(limit.read_text(encoding="ascii"))
        taken = int(used.read_text(encoding="ascii"))
        lines = stat.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such group, or "max"
        return Room(None, None)
    cached = {k: int(v) for k, v in (line.split() for line in lines)}.get("inactive_file", 0)
    return Room(total, total - taken + cached)
