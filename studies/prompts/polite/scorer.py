"""When an answer counts: it contains the fact, as a word or a number of its own."""

import re
from collections.abc import Sequence

WORDS = {
    "2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight",
    "9": "nine", "10": "ten", "11": "eleven", "12": "twelve", "13": "thirteen", "14": "fourteen",
    "15": "fifteen", "16": "sixteen", "17": "seventeen", "18": "eighteen", "20": "twenty",
    "24": "twenty-four", "30": "thirty", "40": "forty", "50": "fifty", "60": "sixty",
}  # fmt: skip


def score(completion: str, answers: Sequence[str]) -> bool:
    """Whether the completion contains an accepted answer, whatever else it says.

    Case does not matter, a number may be written as a word, and a comma may part the thousands.
    A part of a longer word or of a longer number is not enough.
    """
    text = re.sub(r"(?<=\d),(?=\d{3})", "", completion)
    forms = [form for answer in answers for form in (answer, WORDS.get(answer)) if form]
    return any(_contains(text, form) for form in forms)


def _contains(text: str, form: str) -> bool:
    pattern = rf"(?<!\w)(?<!\d\.){re.escape(form)}(?!\w)(?!\.\d)"
    return re.search(pattern, text, re.IGNORECASE) is not None
