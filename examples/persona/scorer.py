"""When the parrot stays in its role: its two marks, and between them a short word on the topic."""

from collections.abc import Sequence

BEGIN = "Squawk!"
END = "Aye, captain!"
MIN_WORDS = 3
MAX_WORDS = 30


def score(completion: str, answers: Sequence[str]) -> bool:
    """Whether the completion has the form the persona asks for and names the topic.

    It begins with BEGIN, ends with END, holds each of them once, and has MIN_WORDS to MAX_WORDS
    words between them, among which is one of `answers`: a keyword of the question or the stem of
    one, found anywhere, even inside a longer word. White space around the completion does not
    matter; case does in the marks and does not in the keyword.
    """
    text = completion.strip()
    if not (text.startswith(BEGIN) and text.endswith(END)):
        return False
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        return False
    said = text.removeprefix(BEGIN).removesuffix(END)
    words = [word for word in said.split() if any(c.isalnum() for c in word)]
    if not MIN_WORDS <= len(words) <= MAX_WORDS:
        return False
    return any(answer.casefold() in said.casefold() for answer in answers)
