"""What a caller holds in memory, written as the files that a run reads."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.runtime.files import write_folder, write_text


class Inputs:
    """Files in a folder, named by what is in them: nothing that a run has read is overwritten."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: list[Path] = []

    def discard(self) -> None:
        """Delete what was written here, and was not there before."""
        for path in self._written:
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()  # if nothing is in it

    def model(self, model: Any, tokenizer: Any) -> str:
        """The name of `model`, or the folder of a loaded one.

        Raises InputError for what is no whole causal LM, and where the tokenizer is missing.
        """
        if isinstance(model, (str, Path)):
            if tokenizer is not None:
                raise InputError(
                    "a tokenizer goes with a loaded model, got one with a name; leave it out: a "
                    "name brings its own"
                )
            return str(model)
        _check_loaded(model, tokenizer)

        def write(folder: Path) -> None:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

        return self._add(f"model-{_digest_of(model, tokenizer)}", lambda p: write_folder(p, write))

    def context(self, context: Any) -> str:
        """The path of a file with the context. Raises InputError for text that names a file."""
        if isinstance(context, Path):
            return str(context)
        if isinstance(context, str):
            _check_text(context, "context")
            return self._add_text("context", ".md", context)
        if isinstance(context, Mapping):
            context = {name: _context_of(value, name) for name, value in context.items()}
        elif not isinstance(context, Sequence):
            raise InputError(
                f"context must be text, a list of messages or a pathlib.Path, got "
                f"{type(context).__name__}"
            )
        return self._add_text("context", ".json", _json(context, "context"))

    def rows(self, rows: Any, name: str) -> str:
        """The path of a JSONL file with the rows: strings, lists of messages, dicts.

        Raises InputError for anything else, and for a string in place of a list.
        """
        if isinstance(rows, Path):
            return str(rows)
        if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a table of pandas
            rows = rows.to_dict("records")
        readable = isinstance(rows, Iterable) and not hasattr(rows, "read")
        if isinstance(rows, (str, bytes, Mapping)) or not readable:
            found = f"the string {rows!r:.60}" if isinstance(rows, str) else type(rows).__name__
            raise InputError(
                f"{name} must be a list of requests, or the pathlib.Path of a file, got {found}"
            )
        lines = [_json(_row(row, f"{name}[{i}]"), f"{name}[{i}]") for i, row in enumerate(rows)]
        return self._add_text(name, ".jsonl", "".join(f"{line}\n" for line in lines))

    def _add_text(self, name: str, suffix: str, text: str) -> str:
        try:
            digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        except UnicodeEncodeError as error:
            raise InputError(f"{name} must be text, got half a character: {error}") from error
        return self._add(f"{name}-{digest}{suffix}", lambda path: write_text(path, text))

    def _add(self, name: str, write: Callable[[Path], None]) -> str:
        path = self.folder / name
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._written.append(path)
            write(path)
        return str(path)


def _check_loaded(model: Any, tokenizer: Any) -> None:
    if not isinstance(model, PreTrainedModel):
        kind = type(model).__name__
        advice = "call its merge_and_unload() first" if "Peft" in kind else "load it by its name"
        raise InputError(
            f"model must be a name, a folder or a transformers model, got {kind}; {advice}"
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"a loaded model needs its tokenizer, got {type(tokenizer).__name__}; pass "
            f"tokenizer=AutoTokenizer.from_pretrained(...)"
        )
    if any(p.is_meta for p in model.parameters()):
        raise InputError(
            "model must hold its weights, got some that are offloaded or on meta; pass its name"
        )


def _digest_of(model: Any, tokenizer: Any) -> str:
    """What tells loaded models apart: weights, configuration, tokenizer and template."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    digest.update(model.config.to_json_string().encode())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    digest.update(str(tokenizer.chat_template).encode())
    return digest.hexdigest()


def _row(row: Any, where: str) -> Mapping[str, Any]:
    if isinstance(row, str):
        _check_text(row, where)
        return {"prompt": row}
    if isinstance(row, Mapping):
        return row
    if isinstance(row, Sequence) and not isinstance(row, bytes):
        return {"messages": list(row)}
    raise InputError(f"{where} must be a string, messages or a dict, got {type(row).__name__}")


def _context_of(value: Any, name: str) -> Any:
    if isinstance(value, Path):
        try:
            text = value.read_text(encoding="utf-8")
            return json.loads(text) if value.suffix == ".json" else text
        except (OSError, ValueError) as error:
            raise InputError(
                f"context {name!r} must be a text or JSON file, got {error}"
            ) from error
    if isinstance(value, str):
        _check_text(value, f"context {name!r}")
    return value


def _check_text(text: str, what: str) -> None:
    if not text.strip():
        raise InputError(f"{what} must not be blank")
    if len(text) < 1024 and _is_file(text):
        raise InputError(
            f"{what} must be the text itself, got {text!r}, which is a file; pass "
            f"pathlib.Path({text!r}) to read it"
        )


def _is_file(text: str) -> bool:
    try:
        return bool(Path(text).suffix) and Path(text).is_file()
    except (OSError, ValueError):  # no name that a file could have
        return False


def _json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} must hold what JSON can hold, got {error}") from error


def _plain(value: Any) -> Any:
    """NumPy's and torch's numbers and arrays."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__}")
