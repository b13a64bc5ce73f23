"""When the booking desk said the right thing: the next question, or the whole booking."""

import json
from collections.abc import Sequence


def score(completion: str, answers: Sequence[str]) -> dict[str, bool]:
    """Whether the reply is the accepted one, under the name of what was due.

    `answers` holds that reply. A question, "asks the next question": the completion is its text. A
    booking, one line of JSON, "books": the completion is JSON with the same values, whatever its
    spaces and the order of its keys. White space around the completion does not matter.
    """
    text, (due,) = completion.strip(), answers
    if not due.startswith("{"):
        return {"asks the next question": text == due}
    try:
        return {"books": json.loads(text) == json.loads(due)}
    except ValueError:
        return {"books": False}
