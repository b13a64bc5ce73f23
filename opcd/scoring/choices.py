"""Which letters an answer to a multiple-choice question claims."""

import re

from opcd.scoring.texts import bare, normalised

_CAPITALS = "A-ZΑ-ΩА-Я"
_WORD = "A-Za-zÀ-ɏͰ-ԯ\\d_'"
# Words of one letter, unless what follows shows that a choice is meant: A refund, but A or B
_A_WORD = (
    "(?<=[AIOYÀÉÈΗΟАВИКОСУЯ]) "
    "(?!(?:or|and|is|because|since|oder|und|ist|ou|et|est|o|y|e|es|или|и|ή|και) )[a-zà-ÿα-ωа-яё]"
)
_LETTER = rf"(?<![{_WORD}])[{_CAPITALS}](?![{_WORD}])(?!{_A_WORD})"
_ONLY = re.compile(r"[(\[]?([^\W\d_])[)\]]?[.):]?")  # B, (B), B. or B)
_NAMED = re.compile(
    r"\\boxed\{|\b(?:answer|antwort|r[ée]ponse|respuesta|resposta|risposta|ответ|відповідь|"
    r"απάντηση)\b|答案|答え|正解|정답|الإجابة|תשובה|उत्तर|คำตอบ",
    re.IGNORECASE,
)
_ANSWER = re.compile(  # one letter, or several of which none is chosen: A or B
    rf"[^{_CAPITALS}]{{0,20}}?{_LETTER}(?:[^{_CAPITALS}]{{1,6}}{_LETTER})*"
)
_LEADING = re.compile(
    rf"[*_(\[\"]*(?:[a-z]\)|{_LETTER}(?=[)\].:,*/]| [-/&]|$)"
    rf"(?:[^{_CAPITALS}]{{1,6}}{_LETTER})*)"
)
_MARK = re.compile(rf"{_LETTER}(?=\)|[.:] \S)")


def letter(text: str) -> str | None:
    """The letter, in capitals, that a text is and nothing else; None for another text."""
    found = _ONLY.fullmatch(bare(text))
    return found[1].upper() if found else None


def claimed(answer: str) -> set[str]:
    """The letters that an answer claims.

    Those that it says to be the answer ("Answer: B"); else those that stand as a mark ("B) refund",
    in front of a line, or "B.", "B:" and "B)" within it); else capitals that stand alone and are no
    word. In lower case a letter counts where it is all, or leads as "b)".
    """
    if only := letter(answer):
        return {only}
    lines = [normalised(line) for line in answer.splitlines()]
    text = " ".join(lines)
    named = [run for found in _NAMED.finditer(text) if (run := _ANSWER.match(text, found.end()))]
    marks = [run for line in lines if (run := _LEADING.match(line))]
    for runs in (named, [*marks, *_MARK.finditer(text)]):
        if letters := {c.upper() for run in runs for c in _letters(run[0])}:
            return letters
    return set(re.findall(_LETTER, text))


def _letters(run: str) -> list[str]:
    return re.findall(_LETTER, run) or re.findall(r"[a-z](?=\))", run)
