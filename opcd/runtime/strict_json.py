"""JSON without what the format does not have and Python reads all the same, and without bombs."""

import json
from typing import Any

MOST_DIGITS = 300  # a float holds that; much longer ones take Python quadratic time


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook. Raises ValueError for equal keys, of which Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key that stands twice among {sorted(key for key, _ in pairs)}")
    return found


def no_constant(name: str) -> Any:
    """A parse_constant: NaN and Infinity raise ValueError."""
    raise ValueError(f"{name}, which JSON does not have")


def short_int(digits: str) -> int:
    """A parse_int. Raises ValueError for a number with more digits than `MOST_DIGITS`."""
    if len(digits.lstrip("-")) > MOST_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def parse_json(text: str | bytes) -> Any:
    """What a JSON text holds. Raises ValueError, in words, for what is none, and for bombs."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys, parse_int=short_int)
    except RecursionError as error:
        raise ValueError("values nested too deeply") from error
