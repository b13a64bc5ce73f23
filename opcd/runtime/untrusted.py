"""A run folder may be a stranger's: what is read of it is data, of a size that it may have.

Weights are safetensors, and the one pickle that opcd writes, trainer.pt, is loaded with
``weights_only``. What would be code, or leads out of the folder, or is there to fill the memory, is
refused before anything is loaded.
"""

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opcd.errors import InputError
from opcd.runtime.strict_json import short_int

OPTIMIZER = "trainer.pt"  # in a checkpoint
MODELS = {"final", "checkpoints", "inputs"}  # folders of a run that hold models
PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib"}
# A model of 100,000 tensors has a header of some 12 MB, a tokenizer of 260,000 tokens 35 MB.
MOST_HEADER = 64 << 20
MOST_JSON = 256 << 20
MOST_LINES = 1 << 30  # of a .jsonl
# By tokenizers, whose reader has its own bounds, and by opcd, which says what it needs of it.
READ_ELSEWHERE = {"tokenizer.json", "vocab.json", "selection.json"}


def check_run_folder(folder: Path) -> None:
    """Raise InputError for a folder with anything in it that no run has written.

    Hidden files are not looked at, since nothing reads them, but those that a write leaves are.
    """
    root = folder.resolve()
    for path in _entries(folder):
        if path.is_symlink():
            _check_link(path, root)
        if path.is_dir():
            continue
        if not stat.S_ISREG(path.stat().st_mode):
            raise InputError(
                f"{path} must be a file, got a pipe, a socket or a device; remove it from the run "
                f"folder"
            )
        _check_file(path, path.relative_to(folder))


def plain_name(name: Any) -> bool:
    """Whether a text names a file in the folder that names it, and none elsewhere."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not re.search(r"[/\\\0]", name)
        and not os.path.splitdrive(name)[0]
    )


def check_index(index: Any, file: Path) -> None:
    """Raise InputError for an index of shards that lie anywhere but beside it."""
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise InputError(f"{file} must hold a weight_map, got none; fetch the model again")
    for shard in shards.values():
        if not plain_name(shard):
            raise InputError(
                f"{file} must name shards that lie beside it, got {str(shard)!r:.80}; do not use "
                f"this model"
            )


def check_header(file: Path) -> None:
    """Raise InputError for a safetensors file whose header is no header of one."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        begins = opened.read(1)
    if size < 8 or length > min(size - 8, MOST_HEADER) or begins != b"{":
        found = f"a header of {length} bytes in a file of {size}" if size >= 8 else f"{size} bytes"
        raise InputError(
            f"{file} must be a safetensors file with a header of at most {MOST_HEADER >> 20} MiB, "
            f"got {found}; restore it from a copy"
        )


def _entries(folder: Path) -> Iterator[Path]:
    """What lies in a folder and below, links not followed."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") and not path.name.startswith((".writing-", ".removing-")):
            continue
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _entries(path)


def _check_link(path: Path, root: Path) -> None:
    """Links name files of the run folder, or, where that lies in a hub's cache, the cache's blobs.

    A link to a folder would lead around what is looked at here.
    """
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{path} must be a file or a link to one, got a link to nothing; restore what it named"
        ) from error
    if target.is_relative_to(root) and target.is_file():
        return
    # REPOSITORY/snapshots/REVISION/..., as huggingface_hub lays it out.
    inside = [up for up in root.parents if up.name == "snapshots"]
    if inside and target.parent == inside[0].parent / "blobs" and target.is_file():
        return
    raise InputError(
        f"{path} must be a file or a link to one in the run folder, got a link to {target}; put "
        f"the file itself there, if you know what it is"
    )


def check_model_files(folder: Path) -> None:
    """Raise InputError for a model's files that a run folder must not hold."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            _check_file(path, Path("final") / path.relative_to(folder))


def _check_file(path: Path, place: Path) -> None:
    """One file by its name, which says who will read it, and how."""
    size, name = path.stat().st_size, path.name
    most = MOST_LINES if path.suffix == ".jsonl" else MOST_JSON
    if path.suffix in (".json", ".jsonl", ".yaml", ".jinja", ".txt", ".md") and size > most:
        raise InputError(
            f"{path} must have at most {most >> 20} MiB, got {size >> 20}; it is no file of a run: "
            f"remove it"
        )
    if path.suffix == ".safetensors":
        check_header(path)
    holds_models = place.parts[0] in MODELS
    if holds_models and path.suffix in PICKLES and not _is_state(place):
        raise InputError(
            f"{path} must not be in a run folder, got a file that loads by pickle, which can run "
            f"code: weights are safetensors here; remove it"
        )
    if holds_models and path.suffix == ".json" and name not in READ_ELSEWHERE:
        _check_settings(path)


def _is_state(place: Path) -> bool:
    return place.name == OPTIMIZER and place.parts[0] == "checkpoints" and len(place.parts) == 3


def _check_settings(path: Path) -> None:
    """What transformers and peft will read of a model, and take for settings."""
    try:
        found = json.loads(path.read_bytes(), parse_int=short_int)
    except (ValueError, RecursionError) as error:
        deep = isinstance(error, RecursionError)
        reason = "values nested too deeply" if deep else str(error)
        raise InputError(f"{path} must be JSON, got {reason}; restore it from a copy") from error
    if path.name.endswith(".index.json"):
        check_index(found, path)
    if not isinstance(found, dict):
        return
    if path.name == "config.json":
        _refuse_kernel(found, path)
    if path.name == "adapter_config.json" and found.get("megatron_config") is not None:
        raise InputError(
            f"{path} must not name code, got a megatron_config, with which peft imports a module "
            f"by its name; remove it there"
        )


def check_no_kernel(folder: Path) -> None:
    """Raise InputError for a model whose settings name code that would be fetched and run.

    Settings that cannot be read are for whoever reads them to say.
    """
    file = folder / "config.json"
    try:
        found = json.loads(file.read_bytes(), parse_int=short_int)
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(found, dict):
        _refuse_kernel(found, file)


def _refuse_kernel(settings: dict[str, Any], path: Path) -> None:
    kernel = settings.get("attn_implementation") or settings.get("_attn_implementation")
    if isinstance(kernel, (str, dict)) and "/" in str(kernel):
        raise InputError(
            f"{path} must not name code, got attn_implementation {str(kernel)!r:.80}, a kernel "
            f"that would be fetched and run; remove it there"
        )
