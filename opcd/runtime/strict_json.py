"""JSON without what the format does not have and Python reads all the same."""

from typing import Any


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object_pairs_hook. Raises ValueError for equal keys, of which Python keeps the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError(f"a key that stands twice among {sorted(key for key, _ in pairs)}")
    return found


def no_constant(name: str) -> Any:
    """A parse_constant: NaN and Infinity raise ValueError."""
    raise ValueError(f"{name}, which JSON does not have")
