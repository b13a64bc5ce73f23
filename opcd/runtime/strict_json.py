"""JSON without what the format does not have and Python reads all the same."""

import json
from collections.abc import Callable
from typing import Any

# What decoding raises: no JSON; a number too long, or beyond what `parse_float` takes; too deep.
NO_JSON = (ValueError, ArithmeticError, RecursionError)


def strict_decoder(parse_float: Callable[[str], Any] = float) -> json.JSONDecoder:
    """A decoder that refuses equal keys, NaN and Infinity, with one of `NO_JSON`."""
    return json.JSONDecoder(
        parse_float=parse_float, parse_constant=_no_constant, object_pairs_hook=_unique_keys
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError for equal keys, of which Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key that stands twice among {sorted(key for key, _ in pairs)}")
    return found


def _no_constant(name: str) -> Any:
    """NaN and Infinity."""
    raise ValueError(f"{name}, which JSON does not have")
