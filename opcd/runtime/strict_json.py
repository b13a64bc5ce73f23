"""JSON without what the format does not have and Python reads all the same, and without bombs."""

import json
from collections.abc import Callable
from typing import Any

MOST_DIGITS = 300  # a float holds that; much longer ones take Python quadratic time
# What decoding raises: no JSON; a number too long, or beyond what `parse_float` takes; too deep.
NO_JSON = (ValueError, ArithmeticError, RecursionError)


def strict_decoder(parse_float: Callable[[str], Any] = float) -> json.JSONDecoder:
    """A decoder that refuses equal keys, NaN and Infinity, with one of `NO_JSON`."""
    return json.JSONDecoder(
        parse_float=parse_float,
        parse_int=short_int,
        parse_constant=_no_constant,
        object_pairs_hook=_unique_keys,
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


def short_int(digits: str) -> int:
    """A parse_int. Raises ValueError for a number with more digits than `MOST_DIGITS`."""
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError, in words, for what is none, and for bombs."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_int=short_int)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error
