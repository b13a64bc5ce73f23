"""Which letters an answer to a multiple-choice question claims."""

import re

from opcd.scoring.texts import bare, normalised, unemphasised

_CAPITALS = "A-ZΑ-ΩА-Я"
_WORD = "A-Za-zÀ-ɏͰ-ԯ\\d_'"
# Words of one letter, unless what follows shows that a choice is meant: A refund, but A or B
_A_WORD = (
    "(?<=[AIOYÀÉÈΗΟАВИКОСУЯ]) "
    "(?!(?:or|and|nor|is|because|since|oder|und|ist|ou|et|est|o|y|e|es|или|и|ή|και) )"
    "[a-zà-ÿα-ωа-яё]"
)
_LETTER = rf"(?<![{_WORD}])[{_CAPITALS}](?![{_WORD}])(?!{_A_WORD})"
_SMALL = (  # no word: what follows ends it, or it is none before others
    rf"(?<![{_WORD}])(?:[a-zα-ωа-я](?=[)\]}}:;*\"]|\.(?: |$)|,(?! \w\b)|$)"
    r"|[bcdfgh](?= (?!(?:or|and|oder|und|ou|et|y|e) )))"
)
_DENIED = re.compile(  # not A; neither (A) nor B; A is wrong; A? No
    r"(?:\b(?i:not|isn't|nor|neither|rather than|instead of|nicht|weder|noch|no es|n'est pas|pas|"
    r"non|não|не)\b|不是)(?: (?:the )?(?:answer|option|choice))?"
    rf"[ *(\[\"]*{_LETTER}[*)\]\"]*(?:(?:, | or | and |/)[*(\[\"]*{_LETTER}[*)\]\"]*)*"
    rf"|{_LETTER}[*)\]\"]* (?:isn't|is (?:not|wrong|incorrect|false))\b"
    rf"|{_LETTER}[*)\]\"]*\? *(?i:no|nope|nein|non|não|нет)\b"  # A? No.
)
_ONLY = re.compile(r"[(\[]?([^\W\d_])[)\]]?[.):]?")  # B, (B), B. or B)
_NAMED = re.compile(
    r"\\boxed\{|\b(?:answer|antwort|r[ée]ponse|respuesta|resposta|risposta|ответ|відповідь|"
    r"απάντηση)\b|答案|答え|正解|정답|الإجابة|תשובה|उत्तर|คำตอบ",
    re.IGNORECASE,
)
_ANSWER = re.compile(  # one letter, or several of which none is chosen: A or B
    rf"[^{_CAPITALS}]{{0,20}}?{_LETTER}(?:[^{_CAPITALS}]{{1,6}}{_LETTER})*"
)
_SMALL_ANSWER = re.compile(
    rf"\W{{0,4}}(?:(?:is|ist|est|es|é|è|option|choice|letter)\b\W{{1,4}}){{0,2}}{_SMALL}",
    re.MULTILINE,
)
_LEADING = re.compile(
    rf"[*(\[\"]*(?:[a-zα-ωа-я](?=[)\]:*]|\.(?: |$)| - |$)|{_LETTER}(?=[)\].:,*/]| [-/&]|$)"
    rf"(?:[^{_CAPITALS}]{{1,6}}{_LETTER})*)"
)
_OPTION = re.compile(  # option b; option a is right
    rf"\b(?i:option|choice|letter)[ *(\[\"]{{1,3}}(?:{_SMALL}|[a-z](?= (?:is|fits|because)\b))"
)
_MARK = re.compile(rf"{_LETTER}(?=\)|[.:]\s\S)|(?<=(?<!\w)\()[a-z](?=\))")


def letter(text: str) -> str | None:
    """The letter, in capitals, that a text is and nothing else; None for another text.

    Letters are those that claims are looked for with: Latin, Greek and Cyrillic ones.
    """
    found = _ONLY.fullmatch(bare(text))
    capital = found[1].upper() if found else ""
    return capital if re.fullmatch(f"[{_CAPITALS}]", capital) else None


def claimed(answer: str) -> set[str]:
    """The letters that an answer claims.

    Those that it says to be the answer ("Answer: B"); else those that stand as a mark ("B) refund",
    in front of a line, or "B.", "B:" and "B)" within it); else capitals that stand alone and are no
    word. In lower case a letter counts where it is all, leads a line as "b)" or "b.", is called an
    option ("option b"), or is said to be the answer. A letter that is denied ("not A", "A? No") is
    not claimed.
    """
    if only := letter(answer):
        return {only}
    lines = [unemphasised(normalised(line)) for line in answer.splitlines()]
    lines = [_DENIED.sub(" ", line).strip() for line in lines]
    text = "\n".join(lines)
    ends = [found.end() for found in _NAMED.finditer(text)]
    named = [
        run for end in ends if (run := _SMALL_ANSWER.match(text, end) or _ANSWER.match(text, end))
    ]
    marks = [run for line in lines if (run := _LEADING.match(line))]
    for runs in (named, [*marks, *_MARK.finditer(text)]):
        if letters := {c.upper() for run in runs for c in _letters(run[0])}:
            return letters
    options = {run[0][-1].upper() for run in _OPTION.finditer(text)}
    return options | set(re.findall(_LETTER, text))


def _letters(run: str) -> list[str]:
    return re.findall(_LETTER, run) or re.findall(_SMALL, run)
