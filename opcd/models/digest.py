"""What tells models apart, wherever their files lie."""

import hashlib
from pathlib import Path

MODEL_FILES = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt", ".py"}
PIECES, PIECE_BYTES = 16, 65_536  # of a model's file, spread over it: weights may be large


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
