"""A model as it is stored: its own files, and where each of its tensors lies in them."""

import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from opcd.errors import InputError
from opcd.models.by_name import resolve_model
from opcd.models.lm import causal_lm
from opcd.runtime.strict_json import parse_json
from opcd.runtime.untrusted import check_header, check_index

log = logging.getLogger(__name__)

# What holds weights in any format, or names their shards; the other files are small.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".pkl", ".pickle", ".npy", ".joblib"),
    *(".safetensors.index.json", ".bin.index.json", ".h5.index.json"),
)
TEMPLATES = "additional_chat_templates"  # the one folder that belongs to a tokenizer
GENERATION_CONFIG = "generation_config.json"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
}


class Slot(NamedTuple):
    """What is known of a tensor without reading it."""

    file: str  # the safetensors file it lies in, or would lie in
    dtype: torch.dtype
    shape: tuple[int, ...]


class ModelFiles:
    """The files of a model by name: a Hugging Face name, a local folder or the built-in one.

    Of a model in PyTorch's .bin files, `slots` names the safetensors files of the same layout.
    Raises InputError if weights are not there in either form.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = _folder(name)
        self._sources: dict[str, Path] = {}  # safetensors file → the file that is there
        self.index: dict[str, Any] | None = None  # of a sharded model
        self.slots: dict[str, Slot] = {}
        for file, source in self._weight_files():
            self._sources[file] = source
            self.slots |= _slots(file, source)

    @property
    def weight_files(self) -> dict[str, list[str]]:
        """The names of the tensors in each safetensors file."""
        files: dict[str, list[str]] = {file: [] for file in self._sources}
        for name, slot in self.slots.items():
            files[slot.file].append(name)
        return files

    @property
    def small_files(self) -> list[Path]:
        """Everything but weights: configuration, tokenizer, templates, processor, licence."""
        found = [*self.folder.iterdir(), *(self.folder / TEMPLATES).glob("*")]
        return sorted(
            file
            for file in found
            if file.is_file()
            and not file.name.startswith(".")
            and not file.name.endswith(WEIGHT_SUFFIXES)
        )

    @property
    def nbytes(self) -> int:
        """What all of it takes on a disk."""
        files = [*self._sources.values(), *self.small_files]
        return sum(file.stat().st_size for file in files)

    @property
    def dtype(self) -> torch.dtype:
        """A dtype that holds every weight exactly: the one that all have, or float32."""
        found = {slot.dtype for slot in self.slots.values() if slot.dtype.is_floating_point}
        return found.pop() if len(found) == 1 else torch.float32

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        source = self._sources[self.slots[name].file]
        if source.suffix == ".bin":
            tensor: Tensor = _read_bin(source)[name]
            return tensor.clone()
        with safe_open(source, "pt") as opened:
            return opened.get_tensor(name)

    def generation_settings(self) -> dict[str, Any]:
        """generation_config.json, or what stands for it where there is none."""
        file = self.folder / GENERATION_CONFIG
        if file.is_file():
            return _read_json(file)
        config = _read_json(self.folder / "config.json")
        known = GenerationConfig().to_dict().keys() - {"transformers_version"}
        found: dict[str, Any] = {}
        for settings in (config.get("text_config") or {}, config):
            found |= {k: v for k, v in settings.items() if k in known and v is not None}
        return found

    def names_for(self, model: torch.nn.Module, on_meta: bool = False) -> dict[str, Tensor]:
        """The tensors of a causal LM that was loaded from here, by their names in the files.

        Adapters are left out, and names that are tied to one that is there. `on_meta` gives
        shapes alone, and takes no memory.
        Raises InputError if a tensor has no place of its shape.
        """
        lm = causal_lm(model)
        state = _once_each(lm.state_dict(), on_meta)
        prefix = f"{lm.base_model_prefix}."
        found: dict[str, Tensor] = {}
        homeless: dict[str, Tensor] = {}
        for name, tensor in revert_weight_conversion(lm, state).items():
            for place in (name, name.removeprefix(prefix), prefix + name):
                if place in self.slots and self.slots[place].shape == tuple(tensor.shape):
                    found[place] = tensor
                    break
            else:
                homeless[name] = tensor
        placed = {id(tensor) for tensor in found.values()}
        lost = sorted(name for name, tensor in homeless.items() if id(tensor) not in placed)
        if lost:
            raise InputError(
                f"every weight of {type(lm).__name__} must have its place in the files of "
                f"{self.name!r}, to be written there again, but {len(lost)} have none, such as "
                f"{lost[0]}; load the model, save it with save_pretrained, and name that folder"
            )
        return found

    def _weight_files(self) -> Iterator[tuple[str, Path]]:
        """Safetensors file → the file that is there, in the order in which transformers looks."""
        for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
            whole = self.folder / f"{stem}.{suffix}"
            if whole.is_file():
                yield "model.safetensors", whole
                return
            index = self.folder / f"{stem}.{suffix}.index.json"
            if index.is_file():
                self.index = _read_json(index)
                check_index(self.index, index)
                for shard in sorted(set(self.index["weight_map"].values())):
                    renamed = shard if suffix == "safetensors" else _as_safetensors(shard)
                    yield renamed, self.folder / shard
                self.index["weight_map"] = {
                    name: shard if suffix == "safetensors" else _as_safetensors(shard)
                    for name, shard in self.index["weight_map"].items()
                }
                return
        raise InputError(
            f"model must hold its weights as model.safetensors or pytorch_model.bin, or in shards "
            f"with an index, got neither in {str(self.folder)!r}; load it, save it with "
            f"save_pretrained, and name that folder"
        )


def _folder(name: str) -> Path:
    """Where a model lies. Of a hub's, what loading it has not fetched is fetched: small files."""
    resolved = resolve_model(name)
    if Path(resolved).is_dir():
        return Path(resolved)
    config = cached_file(resolved, "config.json", local_files_only=True)
    assert config is not None, f"{name} has been loaded"
    folder = Path(config).parent
    ignored = ["*/*", *(f"*{suffix}" for suffix in WEIGHT_SUFFIXES)]
    try:
        snapshot_download(resolved, revision=folder.name, ignore_patterns=ignored)
    except Exception as error:  # of the HTTP library, which is not the same in all versions
        log.info(
            "note      the hub cannot be asked for files of %s that loading did not need, such "
            "as its licence (%s): those at hand are copied",
            name,
            (str(error).splitlines() or [type(error).__name__])[0],
        )
    return folder


def _slots(file: str, source: Path) -> dict[str, Slot]:
    if source.suffix == ".bin":
        tensors = _read_bin(source)
        return {name: Slot(file, t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    check_header(source)
    with safe_open(source, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: Slot(file, _DTYPES[found.get_dtype()], tuple(found.get_shape()))
            for name, found in slices.items()
        }


def _read_bin(source: Path) -> dict[str, Tensor]:
    """Tensors of a .bin file, read from the disk when they are used."""
    mapped = zipfile.is_zipfile(source)  # the format before torch 1.6 cannot be
    found: dict[str, Tensor] = torch.load(
        source, map_location="cpu", mmap=mapped, weights_only=True
    )
    return found


def _as_safetensors(shard: str) -> str:
    return shard.replace("pytorch_model", "model").removesuffix(".bin") + ".safetensors"


def _once_each(state: dict[str, Tensor], on_meta: bool) -> dict[str, Tensor]:
    """A state without its adapters, in which tied tensors are one object."""
    kept: dict[tuple[int, torch.Size], Tensor] = {}
    found = {}
    for name, tensor in state.items():
        if ".lora_" not in name:
            key = tensor.data_ptr(), tensor.shape
            one = kept.setdefault(key, tensor.to("meta") if on_meta else tensor)
            found[name.replace("base_layer.", "")] = one
    return found


def _read_json(file: Path) -> dict[str, Any]:
    """An object. Raises InputError where there is none."""
    try:
        found = parse_json(file.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{file} must be JSON, got {error}; fetch the model again") from error
    if not isinstance(found, dict):
        raise InputError(f"{file} must be a JSON object, got another value; fetch the model again")
    return found
