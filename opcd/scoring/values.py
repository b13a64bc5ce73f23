"""JSON values that can be compared: 1 is 1.0, and true is not 1."""

import re
import unicodedata
from decimal import Decimal
from typing import Any

from opcd.runtime.strict_json import strict_decoder

DECODER = strict_decoder(Decimal)
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
    """A decoded value with true and false told apart from 1 and 0, which Python takes for equal,
    and each text in one Unicode form, which an escape may be another of."""
    if isinstance(value, dict):
        return {comparable(key): comparable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [comparable(item) for item in value]
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value)
    return ("bool", value) if isinstance(value, bool) else value
