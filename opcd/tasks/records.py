"""Files to JSON objects, each with its place: JSONL or a JSON array, packed with gzip or not."""

import codecs
import csv
import gzip
import io
import json
import math
import re
import shlex
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from opcd.errors import InputError
from opcd.runtime.strict_json import NO_JSON, strict_decoder

Record = dict[str, Any]

MOST_UNPACKED = 2 << 30
JSONL = 'JSONL: one {"prompt": "..."} a line'
# Columns of one row: an object with nothing else is no list of rows.
ROW_LISTS = {"messages", "conversations", "conversation", "prompt"}

# What a table's first line names, of which a file by another name is known.
TABLE_COLUMNS = {"prompt", "question", "instruction", "text", "answer", "label", "completion"}

_CSV = "csv.DictReader(open({}, encoding='utf-8-sig', newline=''){})"
_YAML = "yaml.safe_load(open({}, encoding='utf-8'))"
_TABLES = {  # what reads the rows of a file, for a command that converts it
    ".csv": ("csv, json", _CSV),
    ".tsv": ("csv, json", _CSV),
    ".yaml": ("json, yaml", _YAML),
    ".yml": ("json, yaml", _YAML),
}
_DELIMITERS = {",": "", ";": ", delimiter=';'", "\t": ", dialect='excel-tab'"}
_FRAMES = {
    ".parquet": "read_parquet",
    ".feather": "read_feather",
    ".xlsx": "read_excel",
    ".xls": "read_excel",
    ".ods": "read_excel",
}
_PACKED = {".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst"}
_OTHERS = {".arrow", ".pkl", ".pickle", ".db", ".sqlite", ".xml", ".html", ".docx", ".pdf", ".toml"}
_BYTES = {b"PAR1": ".parquet", b"PK\x03\x04": ".zip"}


class Written(float):
    """A number as it is spelled in its file: 4.50 is a price, and no other text is the answer."""

    spelling: str

    def __str__(self) -> str:
        return self.spelling


def read_records(path: str, kind: str) -> list[tuple[str, Record]]:
    """The objects of a file, each with its place: "file:line", in an array "file:line (row n)".

    A file is JSONL, a JSON array of objects, or an object whose only value is such an array
    (``{"data": [...]}``); UTF-8, with a byte order mark or without; packed with gzip or not.

    Raises InputError for other files, with a way to convert them, and for what is no object.
    """
    _check_kind(path, kind)
    records = []
    for source, value in _values(read_text(path, kind), path, kind):
        if not isinstance(value, dict):
            raise InputError(
                f'{source}: must be an object like {{"prompt": "..."}}, got {type(value).__name__}'
            )
        records.append((source, value))
    if not records:
        raise InputError(f"{path}: {kind} must hold at least one line, got none; add examples")
    return records


def read_text(path: str, kind: str) -> str:
    """The text of a UTF-8 file, with line feeds at line ends; what gzip packed is unpacked.

    Raises InputError if it is missing, empty or something else.
    """
    data = _read_data(path, kind)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: must be UTF-8 text, got byte {error.object[error.start]:#x} at offset "
            f"{error.start}; convert the file to UTF-8"
        ) from error
    if not text.strip():
        raise InputError(f"{path}: {kind} must not be empty, got {len(text)} blank characters")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str, kind: str) -> list[bytes]:
    """The lines of a file as they are, for whoever reads on behind one that is broken.

    Raises InputError as `read_text`, but for bytes that are no UTF-8.
    """
    data = _read_data(path, kind).removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise InputError(f"{path}: {kind} must not be empty, got {len(data)} blank characters")
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")


def _read_data(path: str, kind: str) -> bytes:
    """What a file holds, unpacked. Raises InputError where none can be read, and for UTF-16."""
    file = Path(path)
    if file.is_dir():
        raise InputError(f"{kind} must be a file, got the folder {path!r}; name a file in it")
    if not file.is_file():
        raise InputError(
            f"{kind} must be a file, got {path!r}, which is not there; {_path_advice(path)}"
        )
    try:
        data = file.read_bytes()
        data = _unpacked(data, path) if data.startswith(b"\x1f\x8b") else data
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: {kind} must be a whole gzip file, got {error}; copy it again"
        ) from error
    except OSError as error:
        raise InputError(f"{kind} must be readable, got {path!r}: {error.strerror}") from error
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: must be UTF-8 text, got UTF-16; save the file as UTF-8")
    return data


def _unpacked(data: bytes, path: str) -> bytes:
    """What gzip packed. Raises InputError for more than any data has: a bomb is small."""
    with gzip.open(io.BytesIO(data)) as packed:
        found = packed.read(MOST_UNPACKED + 1)
    if len(found) > MOST_UNPACKED:
        raise InputError(
            f"{path}: must unpack to at most {MOST_UNPACKED >> 30} GiB, got more; unpack it "
            f"yourself, if you know what it is, and name a part of it"
        )
    return found


def parse_json(text: str, path: str, kind: str) -> Any:
    """A whole file as one JSON value. Raises InputError naming the line."""
    try:
        return _DECODER.decode(text)
    except NO_JSON as error:
        line = error.lineno if isinstance(error, json.JSONDecodeError) else 1
        raise _no_json(f"{path}:{line}: {kind} must be valid JSON", error) from error


def _path_advice(path: str) -> str:
    if path.isprintable():
        return "check the path"
    return (
        "it holds a tab or a line break, which \\t and \\n are in double quotes; write the path "
        'with "/", or in single quotes'
    )


def _check_kind(path: str, kind: str) -> None:
    """Raise InputError for a file of another kind, by its name or by how it begins."""
    file = Path(path)
    if not file.is_file():
        return  # said where it is read
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if suffix in {*_TABLES, *_FRAMES, *_PACKED, *_OTHERS}:
        raise _refused(path, suffix, kind)
    with file.open("rb") as opened:
        begins = opened.read(4)
    if begins in _BYTES:
        raise _refused(path, _BYTES[begins], kind)


def _refused(path: str, suffix: str, kind: str) -> InputError:
    old, new = Path(path).as_posix(), Path(path).with_suffix(".jsonl").as_posix()
    new = new if new != old else Path(path).with_suffix(f"{suffix}.jsonl").as_posix()
    if suffix in _PACKED or (suffix in {*_TABLES, *_FRAMES} and path.lower().endswith(".gz")):
        fix = "unpack it first (a .jsonl.gz is read as it is)"
    elif suffix in _TABLES:
        modules, rows = _TABLES[suffix]
        fix = _conversion(
            f"import {modules}; open({new!r}, 'w', encoding='utf-8').writelines(json.dumps(row) + "
            f"chr(10) for row in {rows.format(repr(old), _DELIMITERS[_delimiter(path)])})"
        )
    elif suffix in _FRAMES:
        fix = _conversion(
            f"import pandas; pandas.{_FRAMES[suffix]}({old!r}).to_json({new!r}, orient='records', "
            f"lines=True, force_ascii=False)"
        )
    else:
        fix = f"save it as {JSONL}"
    return InputError(f"{kind} must be JSONL or a JSON array, got {path!r} ({suffix}); {fix}")


def _conversion(code: str) -> str:
    """A command for a shell; in double quotes, which Windows takes too, where names allow them."""
    quoted = shlex.quote(code) if set(code) & set('"$`\\!') else f'"{code}"'
    return f"convert it: python -c {quoted}"


def _delimiter(path: str) -> str:
    """What stands between the columns of a table's first line."""
    with Path(path).open(encoding="utf-8-sig", errors="replace") as opened:
        first = opened.readline()
    return max(_DELIMITERS, key=first.count)


def _is_table(first: str) -> bool:
    """Whether a file's first line names columns, as in CSV."""
    rows = [next(csv.reader([first], delimiter=mark), []) for mark in _DELIMITERS]
    return any(len(row) > 1 and {c.strip().lower() for c in row} & TABLE_COLUMNS for row in rows)


def _values(text: str, path: str, kind: str) -> Iterator[tuple[str, Any]]:
    start = _skip(text, 0)
    if text[start] == "[":
        yield from _elements(text, start, path)
        return
    wrapped = _wrapped(text, start)
    if wrapped is not None:
        yield from _elements(text, wrapped, path)
        return
    if text[start] != "{":
        first = text.strip().splitlines()[0]
        if _is_table(first):
            raise _refused(path, ".csv", kind)
        raise InputError(
            f"{path}:1: must be {JSONL} (or a JSON array of them), got the text {first[:40]!r}; "
            f"convert it"
        )
    yield from _lines(text, path)


def _lines(text: str, path: str) -> Iterator[tuple[str, Any]]:
    """JSONL; one object alone may take several lines."""
    try:
        yield f"{path}:1", _DECODER.decode(text)
        return
    except NO_JSON:
        pass  # one object a line, or a mistake whose line is found here
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = _DECODER.decode(line)
            except NO_JSON as error:
                must = f"{path}:{number}: each line must be one JSON object"
                raise _no_json(must, error) from error
            yield f"{path}:{number}", value


def _wrapped(text: str, start: int) -> int | None:
    """Where the array of objects opens in an object with nothing else, unless that is a row."""
    opened = _ONE_LIST.match(text, start)
    if opened is None or opened["key"] in ROW_LISTS:
        return None
    try:
        value, end = _DECODER.raw_decode(text, start)
    except NO_JSON:
        pass  # the mistake is found where it is
    else:
        if len(value) > 1 or text[end:].strip():
            return None
    return opened.start("array")


def _elements(text: str, opens: int, path: str) -> Iterator[tuple[str, Any]]:
    """The values of the array that opens there, up to the file's end."""
    line, counted, row = 1, 0, 0
    at = _skip(text, opens + 1)
    closed = text[at : at + 1] == "]"
    while not closed:
        row += 1
        line, counted = line + text.count("\n", counted, at), at
        source = f"{path}:{line} (row {row})"
        try:
            value, at = _DECODER.raw_decode(text, at)
            at = _skip(text, at)
            closed = text[at : at + 1] == "]"
            if not closed and text[at : at + 1] != ",":
                raise json.JSONDecodeError("no comma and no ] behind a value", text, at)
        except NO_JSON as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            must = f"{path}:{where} (row {row}): a file that opens with [ must be one JSON array"
            raise _no_json(must, error) from error
        yield source, value
        at = at if closed else _skip(text, at + 1)
    rest = text[at + 1 :].strip()
    if rest != ("}" if text.lstrip()[0] == "{" else ""):
        raise InputError(
            f"{path}: must be one JSON array, or an object that holds nothing else, got "
            f"{rest[:40]!r} behind it; leave that out"
        )


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches everywhere


def _no_json(must: str, error: Exception) -> InputError:
    reason, fix = str(error), "correct that line"
    if isinstance(error, json.JSONDecodeError):
        reason = f"{error.msg} at column {error.colno}"
        if "escape" in error.msg:
            fix = r'write a backslash as "\\", in a path also as "/"'
    return InputError(f"{must}, got {reason}; {fix}")


def _written(spelling: str) -> Written:
    number = Written(spelling)
    if math.isinf(number):
        raise ValueError(f"{spelling}, which is too large for a number")
    number.spelling = spelling
    return number


_DECODER = strict_decoder(_written)
_SPACE = re.compile(r"[ \t\n\r]*")
_ONE_LIST = re.compile(r'\{\s*"(?P<key>[^"\\]*)"\s*:\s*(?P<array>\[)\s*[{\]]')
