"""A completion is thought and answer: only what stands behind the thought is judged."""

import re
from typing import NamedTuple

# What begins and ends a thought.
PAIRS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel>thought", "<channel|>"),
)
# Tokens that mark a thought off; a tokenizer may hold them as special ones.
MARKS = {mark for pair in PAIRS for mark in pair} | {"<|channel>", "<|channel|>", "<|message|>"}

_OPENS, _CLOSES = ("|".join(map(re.escape, marks)) for marks in zip(*PAIRS, strict=True))
_BEGIN = re.compile(rf"\A\s*(?:{_OPENS}|<\|channel\|>(?!final))", re.IGNORECASE)
_END = re.compile(rf"{_CLOSES}|<\|channel\|>final[^\n]*?<\|message\|>", re.IGNORECASE)
_OPENED = re.compile(rf"(?:{_OPENS})\s*\Z", re.IGNORECASE)


class Parts(NamedTuple):
    """A completion in its two parts."""

    thought: str  # "" where there is none
    answer: str | None  # None: the thought does not end


def split_thought(completion: str) -> Parts:
    """Cut at the last end of a thought; its beginning may stand in the prompt.

    Known are `PAIRS` and channels, of which ``<|channel|>final<|message|>`` begins the answer.
    """
    ends = [*_END.finditer(completion)]
    thought = completion[: ends[-1].start()] if ends else ""
    answer = completion[ends[-1].end() :] if ends else completion
    if _BEGIN.match(answer):
        return Parts(completion.strip(), None)
    return Parts(_BEGIN.sub("", thought).strip(), answer.strip())


def opened_thought(prompt: str) -> str:
    """The mark at the end of a rendered prompt that begins the model's thought, or ""."""
    found = _OPENED.search(prompt)
    return found[0] if found else ""
