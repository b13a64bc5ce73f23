"""YAML in which nothing is lost or guessed: keys stand once, 1e-4 is a number, a date is text.

Nor is anything written that grows when it is read: a text has a size, and no aliases.
"""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from opcd.errors import InputError

BACKSLASH = (
    "a backslash in double quotes begins an escape in YAML: write the path with '/', or in single "
    "quotes"
)


MOST_BYTES = 1 << 20  # of a file: a configuration has some thousand
TAG = "tag:yaml.org,2002:"
SPELLED = "!spelled"  # what older YAML takes for true and false, and JSON and YAML 1.2 do not
RESOLVERS = (
    (TAG + "null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    (TAG + "bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    (TAG + "int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    (
        TAG + "float",
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    (TAG + "float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
    (SPELLED, r"(?i:yes|no|on|off)", list("yYnNoO")),
)


class _Loader(yaml.SafeLoader):
    """Scalars as the JSON schema of YAML 1.2 reads them, with comments and bare words."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  # yaml's own, per class

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()
            # A few of them, each of the one before, stand for more than any memory holds.
            raise yaml.composer.ComposerError(
                None, None, f"the alias *{event.anchor}: write out what it names", event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            key = self.construct_object(name, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} for the second time", name.start_mark
                )
            if isinstance(key, Hashable):  # yaml itself refuses others
                seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what the loader would not read as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


def _refuse_spelled(loader: Any, node: Any) -> Any:
    raise yaml.constructor.ConstructorError(
        None, None, f"{node.value}: write true or false, or the word in quotes", node.start_mark
    )


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in RESOLVERS:
        _kind.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_constructor(SPELLED, _refuse_spelled)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds. Raises ValueError, in words, for one that holds none."""
    if len(text) > MOST_BYTES:
        raise ValueError(f"more than {MOST_BYTES >> 20} MiB, which no configuration has")
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        raise ValueError(_reason(error)) from error


def dump_yaml(value: Any) -> str:
    """YAML that `parse_yaml` reads as the same value; one line where it is no mapping or list."""
    return yaml.dump(value, Dumper=_Dumper, width=10_000, sort_keys=False, allow_unicode=True)


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds. Raises InputError where it cannot be read as `what` it should be."""
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"bytes that are no UTF-8 ({error.reason} at {error.start}); save it as UTF-8"
        raise InputError(f"{path} must hold {what}, got none: {reason}") from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise InputError(f"{path} must hold {what} as YAML, got {error}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "values nested too deeply"
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    context = getattr(error, "context", None) or ""
    escaped = "quoted scalar" in context and ("escape" in problem or "hex" in problem)
    return f"{problem}{where}" + (f"; {BACKSLASH}" if escaped else "")
