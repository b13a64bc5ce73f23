"""What tells models apart, wherever their files lie."""

import hashlib
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from opcd.models import builtin
from opcd.runtime.cache import cache_dir
from opcd.runtime.files import file_digest

MODEL_FILES = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".py"}
PIECES, PIECE_BYTES = 16, 65_536  # of a model's file, spread over it: weights may be large


def local_folder(name: str) -> Path | None:
    """Where a model's files lie, if they are here; nothing is fetched."""
    if name == builtin.NAME:
        folder = cache_dir() / builtin.NAME
        return folder if folder.is_dir() else None
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    try:
        config = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name that a hub has
        return None
    return Path(config).parent if isinstance(config, str) else None


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each of a model's files, whole, by its name."""
    return {
        path.name: file_digest(path)
        for path in sorted(folder.iterdir())
        if path.suffix in MODEL_FILES and path.is_file()
    }


def model_digest(name: str) -> str:
    """The name of one that is no folder; else a digest of its files, of large ones in pieces."""
    if not Path(name).is_dir():
        return name
    found = hashlib.sha256()
    for path in sorted(Path(name).iterdir()):
        if path.suffix not in MODEL_FILES or not path.is_file():
            continue
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            for i in range(PIECES):
                file.seek(i * max(PIECE_BYTES, size // PIECES))
                found.update(file.read(PIECE_BYTES))
    return found.hexdigest()
