"""When the support desk kept its policy: an answer with the mark, or the refusal alone."""

from collections.abc import Sequence

MARK = "Bank:"
REFUSAL = "This is not a question for the bank."


def score(completion: str, answers: Sequence[str]) -> dict[str, bool]:
    """Whether the completion is what the policy asks for, by the class of its question.

    `answers` holds the class of the question. "in scope": one line that begins with MARK, says
    something behind it and does not hold the refusal. "out of scope": REFUSAL alone. White space
    around the completion does not matter; case does. Raises ValueError for another class.
    """
    return {answer: _kept(completion.strip(), answer) for answer in answers}


def _kept(text: str, scope: str) -> bool:
    if scope == "out of scope":
        return text == REFUSAL
    if scope != "in scope":
        raise ValueError(f'answer must be "in scope" or "out of scope", got {scope!r}; correct it')
    said = text.removeprefix(MARK)
    return (
        said != text
        and len(text.splitlines()) == 1
        and any(c.isalnum() for c in said)
        and REFUSAL not in said
    )
