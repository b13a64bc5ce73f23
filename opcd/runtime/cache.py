"""Where opcd keeps what it can make again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """The environment's `OPCD_CACHE`, or ~/.cache/opcd."""
    return Path(os.environ.get("OPCD_CACHE") or Path.home() / ".cache" / "opcd")
