"""When a line of JSON counts: it parses, and it says what the guest said."""

import json
from collections.abc import Sequence
from typing import Any


def score(completion: str, answers: Sequence[str]) -> bool:
    """Whether the completion is one line of JSON that says what an accepted answer says.

    `answers` are such lines as well. The order of the keys and the white space between them do not
    matter. Wrong are: text around the object, a second line, a key too many, missing or given
    twice, a request that is not text and a room that is not a whole number.
    """
    said = _read(completion)
    return said is not None and any(said == _read(answer) for answer in answers)


def _read(text: str) -> tuple[str, int] | None:
    """The request and the room; None for anything but one line that holds exactly these."""
    text = text.strip()
    if len(text.splitlines()) != 1:
        return None
    try:
        value = json.loads(text, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):  # no JSON; a number too long; nested too deeply
        return None
    if not isinstance(value, _Pairs) or sorted(key for key, _ in value) != ["request", "room"]:
        return None
    request, room = (dict(value)[key] for key in ("request", "room"))
    if not isinstance(request, str) or type(room) is not int:  # bool is an int as well
        return None
    return request, room


class _Pairs(list[tuple[str, Any]]):
    """An object's keys and values in their order; unlike a dict, it shows a key given twice."""
