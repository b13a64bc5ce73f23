"""What a caller holds in memory, written as the files that a run reads."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from opcd.errors import InputError
from opcd.runtime.files import write_folder, write_text


def write_model(model: Any, tokenizer: Any, folder: Path, keep: bool) -> str:
    """The name of `model`; a loaded one is written to `folder`, unless `keep` finds it there.

    Raises InputError for what is no whole causal LM, and where the tokenizer is missing.
    """
    if isinstance(model, (str, Path)):
        if tokenizer is not None:
            raise InputError(
                "a tokenizer goes with a loaded model, got one with a name; leave it out: a name "
                "brings its own"
            )
        return str(model)
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

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)

    if not (keep and folder.is_dir()):
        write_folder(folder, write)
    return str(folder)


def write_context(context: Any, folder: Path) -> str:
    """The path of a file with the context. Raises InputError for text that names a file."""
    if isinstance(context, Path):
        return str(context)
    folder.mkdir(exist_ok=True)
    if isinstance(context, str):
        _check_text(context, "context")
        write_text(folder / "context.md", context)
        return str(folder / "context.md")
    if isinstance(context, Mapping):
        context = {name: _context_of(value, name) for name, value in context.items()}
    elif not isinstance(context, Sequence):
        raise InputError(
            f"context must be text, a list of messages or a pathlib.Path, got "
            f"{type(context).__name__}"
        )
    write_text(folder / "context.json", _json(context, "context"))
    return str(folder / "context.json")


def write_rows(rows: Any, file: Path, name: str) -> str:
    """The path of a JSONL file with the rows: strings, lists of messages, dicts.

    Raises InputError for anything else, and for a string in place of a list.
    """
    if isinstance(rows, Path):
        return str(rows)
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        found = f"the string {rows!r:.60}" if isinstance(rows, str) else type(rows).__name__
        raise InputError(
            f"{name} must be a list of requests, or the pathlib.Path of a file, got {found}"
        )
    file.parent.mkdir(exist_ok=True)
    lines = [_json(_row(row, f"{name}[{i}]"), f"{name}[{i}]") for i, row in enumerate(rows)]
    write_text(file, "".join(f"{line}\n" for line in lines))
    return str(file)


def _row(row: Any, where: str) -> Mapping[str, Any]:
    if isinstance(row, str):
        return {"prompt": row}
    if isinstance(row, Mapping):
        return row
    if isinstance(row, Sequence):
        return {"messages": list(row)}
    raise InputError(f"{where} must be a string, messages or a dict, got {type(row).__name__}")


def _context_of(value: Any, name: str) -> Any:
    if isinstance(value, Path):
        try:
            return value.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"context {name!r} must be a text file, got {error}") from error
    if isinstance(value, str):
        _check_text(value, f"context {name!r}")
    return value


def _check_text(text: str, what: str) -> None:
    if not text.strip():
        raise InputError(f"{what} must not be blank; pass the text that the model is to learn")
    if len(text) < 4096 and "\n" not in text and Path(text).is_file():
        raise InputError(
            f"{what} must be the text itself, got {text!r}, which is a file; pass "
            f"pathlib.Path({text!r}) to read it"
        )


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
