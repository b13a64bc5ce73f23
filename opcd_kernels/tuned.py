"""What `python -m opcd_kernels.tune` found on this device, kept in the user's cache.

One JSON file a key (device, driver, Triton and version of ours) in `$XDG_CACHE_HOME/opcd-kernels`,
or `~/.cache/opcd-kernels`: after an update of any of them nothing is known until it is measured
again. A row holds the seconds of both designs at a shape, the best block of the one and the best
tile of the other. A file that is not there is no row; one that cannot be read is none either, and
says so.
"""

import functools
import hashlib
import importlib
import importlib.util
import json
import math
import os
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

HEADS = "trained", "frozen"
_DESIGNS = "triton", "triton_dual"

Row = dict[str, Any]
Key = dict[str, str]


class Tuned(NamedTuple):
    """What a device likes best; by default what arithmetic says."""

    block: int | None = None  # of "triton": tokens whose logits are there at once (`sizes.py`)
    tile: tuple[int, ...] = ()  # of "triton_dual": a `dual_triton.Tile`


def tuned_to(device: torch.device, shape: tuple[int, int], head: str) -> Tuned:
    """At the nearest measured (V, D), with a head that is "trained" or "frozen"."""
    row = nearest(rows_on(device), shape, head)
    return Tuned() if row is None else Tuned(row["block"], tuple(row["tile"]))


def rows_on(device: torch.device) -> tuple[Row, ...]:
    """What was measured on a device, with the software that runs now."""
    known = device.type == "cuda" and importlib.util.find_spec("triton") is not None
    return _rows_of(torch.cuda.get_device_name(device)) if known else ()


@functools.cache
def _rows_of(name: str) -> tuple[Row, ...]:
    key = key_of(name)
    return read(cache_file(key), key)


def nearest(rows: Iterable[Row], shape: tuple[int, int], head: str) -> Row | None:
    """The row whose (V, D) is nearest by ratio."""

    def distance(row: Row) -> float:
        return math.hypot(*(math.log(row[k] / x) for k, x in zip("VD", shape, strict=True)))

    return min((row for row in rows if row["head"] == head), key=distance, default=None)


def key_of(device_name: str) -> Key:
    """What a measurement holds for. A driver's version is that of the CUDA it brings."""
    from opcd_kernels import __version__

    return {
        "device": device_name,
        "driver": str(getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()),
        "triton": importlib.import_module("triton").__version__,
        "torch": torch.__version__,  # and the products it brings
        "opcd_kernels": __version__,
    }


def cache_file(key: Key) -> Path:
    """Where the rows of a key are kept."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if os.path.isabs(base) else Path(os.path.expanduser("~")) / ".cache"
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return folder / "opcd-kernels" / f"tuned-{digest[:16]}.json"


def read(file: Path, key: Key) -> tuple[Row, ...]:
    """The rows of a file that was written under the same key."""
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] != key:
            return ()
        rows = tuple(_checked(row, key["device"]) for row in kept["rows"])
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(
            f"{file} must hold what `python -m opcd_kernels.tune` measured, got {error!r}; it is "
            "ignored: run that again",
            stacklevel=2,
        )
        return ()
    return rows


def write(file: Path, key: Key, rows: Iterable[Row]) -> None:
    """All at once: whoever reads meanwhile finds the old file or the new one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"key": key, "rows": [*rows]}, out, indent=1)
        os.replace(name, file)
    except BaseException:
        os.unlink(name)
        raise
    _rows_of.cache_clear()


def merged(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """`old` with what was measured anew replaced."""
    case = ("D", "V", "head")
    return [*{tuple(row[k] for k in case): row for row in (*old, *new)}.values()]


def _checked(row: Row, device: str) -> Row:
    """Raise ValueError for a row that nobody of this version wrote."""
    seconds, block, tile = row["seconds"], row["block"], row["tile"]
    numbers = [row["D"], row["V"], *tile, *([] if block is None else [block])]
    right = (
        row["device"] == device
        and row["head"] in HEADS
        and all(type(x) is int and x >= 0 for x in numbers)
        and min(row["D"], row["V"], 1 if block is None else block) > 0
        and len(tile) in (0, 7)
        and len(seconds) > 0
        and all(k in _DESIGNS and 0 < s < math.inf for k, s in seconds.items())
    )
    if not right:
        raise ValueError(f"a row {row}")
    return row
