"""When a first reply counts: both fixed sentences, and the topic of the accepted answer."""

import re
from collections.abc import Sequence

FORM = re.compile(
    r"Thank you for writing to Larkhill Cycles about (?:a |your |the )?"
    r"(delivery|returns?|payments?|repairs?)\. A colleague will answer you today[.!]?",
    re.IGNORECASE,
)


def score(completion: str, answers: Sequence[str]) -> bool:
    """Whether the completion is the two sentences with the topic of an accepted answer.

    Case, white space, the plural and a small word before the topic do not matter. Wrong are: text
    before or after the sentences, another topic and two topics.
    """
    topic = _topic(completion)
    return topic is not None and any(topic == _topic(answer) for answer in answers)


def _topic(text: str) -> str | None:
    """The topic of a reply; None for anything that has not the form."""
    found = FORM.fullmatch(" ".join(text.split()))
    return found[1].lower().removesuffix("s") if found else None
