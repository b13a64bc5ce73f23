"""JSON values that can be compared: 1 is 1.0, and true is not 1."""

import json
import re
import unicodedata
from decimal import Decimal
from typing import Any

from opcd.runtime.strict_json import no_constant, unique_keys

DECODER = json.JSONDecoder(
    parse_float=Decimal, parse_constant=no_constant, object_pairs_hook=unique_keys
)
# What decoding raises: no JSON; a number too long, or beyond a decimal's exponents; too deep.
NO_JSON = (ValueError, ArithmeticError, RecursionError)
_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL | re.IGNORECASE)


def read_value(text: str) -> Any:
    """The value of JSON, or of one fence with JSON in it. Raises one of `NO_JSON`."""
    text = unicodedata.normalize("NFC", text.strip())
    if fenced := _FENCE.fullmatch(text):
        text = fenced[1].strip()
    value, end = DECODER.raw_decode(text)
    if text[end:].strip():
        raise ValueError("text behind the value")
    return comparable(value)


def comparable(value: Any) -> Any:
    """A decoded value with true and false told apart from 1 and 0, which Python takes for equal."""
    if isinstance(value, dict):
        return {key: comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    return ("bool", value) if isinstance(value, bool) else value
