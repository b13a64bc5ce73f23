"""Models written as the base's own files, with other weights."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from opcd.errors import InputError
from opcd.models.files import GENERATION_CONFIG, ModelFiles
from opcd.models.lm import eos_token_ids
from opcd.runtime.files import write_json, write_text
from opcd.runtime.untrusted import check_model_files


class ModelWriter:
    """How a run writes models: what they start from, and the tokens that end a completion.

    Every file of the base is copied byte for byte, and its weights are written under its names
    and in its shards (as safetensors where the base has .bin files). generation_config.json alone
    is another, or new, where training ends completions with other tokens than it does, and
    chat_template.jinja where another template was given, or arguments for it.
    Raises InputError if the student's weights have no place in the base's files.
    """

    def __init__(
        self, base: ModelFiles, student: torch.nn.Module, chat_template: str | None = None
    ) -> None:
        base.names_for(student, on_meta=True)
        self._chat_template = chat_template
        self.base = base
        self.eos_ids = eos_token_ids(student)

    def write(
        self, folder: Path, tensors: Callable[[str], Tensor | None], as_stored: bool = True
    ) -> None:
        """Write a model into a folder that is there, a shard in memory at a time.

        `tensors` gives a weight by its name in the files, or None for what the causal LM does not
        hold, which stays the base's. `as_stored` puts each in the dtype that the base keeps it in.
        """
        self.write_small(folder)
        size = 0
        for file, names in self.base.weight_files.items():
            shard: dict[str, Tensor] = {}
            storages: set[int] = set()
            for name in names:
                given = tensors(name)
                tensor = self.base.read(name) if given is None else given.detach()
                dtype = self.base.slots[name].dtype if as_stored else tensor.dtype
                shard[name] = _alone(tensor.to("cpu", dtype), storages)
                size += shard[name].nbytes
            save_file(shard, folder / file, metadata={"format": "pt"})
        if self.base.index is not None:
            self._write_index(folder, None if as_stored else size)

    def write_small(self, folder: Path) -> None:
        """Everything but the weights."""
        for file in self.base.small_files:
            copy = folder / file.relative_to(self.base.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
        if self._chat_template is not None:
            write_text(folder / "chat_template.jinja", self._chat_template)
        settings = self.base.generation_settings()
        if _as_set(settings.get("eos_token_id")) != set(self.eos_ids):
            ids = self.eos_ids if len(self.eos_ids) > 1 else self.eos_ids[0]
            write_json(folder / GENERATION_CONFIG, settings | {"eos_token_id": ids})

    def rehearse(self, folder: Path) -> None:
        """Write the small files once, and throw them away. Raises InputError if that fails."""
        try:
            folder.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder, prefix=".writing-") as aside:
                self.write_small(Path(aside))
                self._check_files(Path(aside))
        except OSError as error:
            raise InputError(
                f"the files of {self.base.name!r} must be copied to {str(folder)!r}, got {error}; "
                f"make them readable, or choose another output_dir"
            ) from error

    def _check_files(self, written: Path) -> None:
        """Raise InputError for what a run's folder must not hold: nobody could open it again."""
        try:
            check_model_files(written)
        except InputError as error:
            found = str(error).replace(str(written), str(self.base.folder))
            raise InputError(f"what is copied from the base stands in its run: {found}") from error

    def _write_index(self, folder: Path, size: int | None) -> None:
        name = "model.safetensors.index.json"
        own = self.base.folder / name
        if size is None and own.is_file():
            shutil.copyfile(own, folder / name)
            return
        index: dict[str, Any] = dict(self.base.index or {})
        if size is not None:
            index["metadata"] = (index.get("metadata") or {}) | {"total_size": size}
        write_json(folder / name, index)


def _alone(tensor: Tensor, storages: set[int]) -> Tensor:
    """The tensor in memory that no other tensor of its file shares, as safetensors wants it."""
    tensor = tensor.contiguous()
    storage = tensor.untyped_storage()
    if storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def _as_set(ids: Any) -> set[int]:
    if ids is None:
        return set()
    return set(ids) if isinstance(ids, list) else {ids}
