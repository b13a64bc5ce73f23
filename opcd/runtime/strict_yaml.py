"""YAML in which nothing is lost or guessed: no key twice, no dates, 1e-4 is a number."""

import re
from pathlib import Path
from typing import Any

import yaml

from opcd.errors import InputError

BACKSLASH = (
    "a backslash in double quotes begins an escape in YAML: write the path with '/', or in single "
    "quotes"
)


class _Loader(yaml.SafeLoader):
    """Scalars as the JSON schema of YAML 1.2 reads them, with comments and bare words."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                mark = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} for the second time", mark
                )
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"null|Null|NULL|~|", ["n", "N", "~", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), _first
    )


def read_yaml(path: Path, what: str) -> Any:
    """What a YAML file holds. Raises InputError where it cannot be read as `what` it should be."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "it is not there" if isinstance(error, FileNotFoundError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = f"bytes that are no UTF-8 ({error.reason} at {error.start}); save it as UTF-8"
        raise InputError(f"{path} must hold {what}, got none: {reason}") from error
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} must hold {what} as YAML, got {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "values nested too deeply"
    problem = getattr(error, "problem", None) or str(error)
    mark = getattr(error, "problem_mark", None)
    where = f" in line {mark.line + 1}" if mark is not None else ""
    context = getattr(error, "context", None) or ""
    escaped = "quoted scalar" in context and ("escape" in problem or "hex" in problem)
    return f"{problem}{where}" + (f"; {BACKSLASH}" if escaped else "")
