"""When two texts say the same: spelling, quotes, markup and word boundaries of many scripts."""

import functools
import re
import unicodedata

_SIGNS = str.maketrans(
    dict.fromkeys("‘’‚‛′´＇ʼ׳", "'")
    | dict.fromkeys("“”„‟″〝〞〟＂״«»「」『』｢｣", '"')
    | {"٪": "%", "٫": ".", "٬": ",", "−": "-"}
)
_SUPERSCRIPT = re.compile("[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")
_FRACTION = re.compile("[¼-¾⅐-⅞]")
_ACCENTS_OF_CASE = re.compile("(?<=[α-ω])\u0301|(?<=i)\u0307")
_BEFORE_PERCENT = re.compile(r"(?<=\d) (?=%)")
_EMPHASIS = re.compile(r"(?<!\w)_+|_+(?!\w)")
_AROUND_ITEMS = re.compile(r"(?<=[\[({,]) | (?=[\])},])")
_THOUSANDS = re.compile(r"(?<![\d.,'])[1-9]\d{0,2}([,'])\d{3}(?:\1\d{3})*(?![\d,'])")

_FINAL = ".!?,;:。、؟،؛۔।॥።။၊។៕։·"
_WRAPPINGS = ("```", "**", "__", "*", "_", "`", '"', "'")

_HANGUL = re.compile("[\u1100-\u11ff\uac00-\ud7a3]")
# Scripts that are written without spaces, and Hangul, whose particles stand at the noun.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf"
    "\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff]"
)


def normalised(text: str) -> str:
    """One spelling for what people take for the same text; case is kept.

    NFKC, straight quotes, plain dashes, ASCII digits, no marks of direction or of zero width, one
    space where there is white space. ``10³`` becomes ``10^3`` and ``1½`` becomes ``1 1/2``.
    """
    text = text.translate(_SIGNS)
    text = _SUPERSCRIPT.sub(lambda found: "^" + unicodedata.normalize("NFKC", found[0]), text)
    text = _FRACTION.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFKC", "".join(map(_plain, text)))
    text = text.replace("⁄", "/").replace("−", "-")
    return _BEFORE_PERCENT.sub("", " ".join(text.split()))


def folded(text: str) -> str:
    """Without case, and without the accents that Greek capitals lack and Turkish ones have."""
    text = unicodedata.normalize("NFKD", text.casefold())
    return unicodedata.normalize("NFKC", _ACCENTS_OF_CASE.sub("", text))


def unemphasised(text: str) -> str:
    """Without underscores around words: ``_42_`` is 42, and ``x_2`` stays."""
    return _EMPHASIS.sub("", text)


def bare(text: str) -> str:
    """Normalised, without thousands separators, final punctuation, and quotes or markup around."""
    text, before = _together(normalised(text)), None
    while text != before:
        before = text
        text = _unwrapped(text.lstrip("¿¡ ").rstrip(_FINAL + " ") or text)
    return text


def holds(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text, as words of its own where its script has spaces.

    Case is ignored, but not of a phrase in capitals alone: IT is another word than it. So are the
    spaces of a list in brackets.
    """
    text, phrase = normalised(text), bare(phrase)
    if any(bracket in phrase for bracket in "[({"):
        text, phrase = (_AROUND_ITEMS.sub("", t) for t in (text, phrase))
    text, phrase = _together(text), _together(phrase)
    if not phrase.isupper():
        text, phrase = folded(text), folded(phrase)
    for found in re.finditer(f"(?={re.escape(phrase)})", text):
        begin, end = found.start(), found.start() + len(phrase)
        left, right = text[max(0, begin - 2) : begin][::-1], text[end : end + 2]
        if not _runs_on(phrase[0], left) and not _runs_on(phrase[-1], right, rightwards=True):
            return True
    return False


@functools.cache
def _plain(character: str) -> str:
    kind = unicodedata.category(character)
    if kind == "Cf" or "\ufe00" <= character <= "\ufe0f":  # invisible: directions, joiners, looks
        return ""
    if kind == "Nd":
        return str(unicodedata.decimal(character))
    return "-" if kind == "Pd" else character


def _together(text: str) -> str:
    return _THOUSANDS.sub(lambda found: found[0].replace(found[1], ""), text)


def _unwrapped(text: str) -> str:
    for mark in _WRAPPINGS:
        inner = text[len(mark) : -len(mark)]
        if inner and text == f"{mark}{inner}{mark}" and mark not in inner:
            return inner.strip()
    return text


def _runs_on(edge: str, beyond: str, rightwards: bool = False) -> bool:
    """Whether the word of the character `edge` goes on; `beyond`: the next two, outwards."""
    if rightwards and beyond[:1] in ("+", "#"):  # C++, C#, A+
        return True
    if not (edge.isalnum() or edge == "_" or unicodedata.category(edge).startswith("M")):
        return False
    if edge.isdecimal() and beyond[:1] in tuple(".,:/"):
        return beyond[1:].isdecimal()
    neighbour = beyond.replace("_", "")[:1] if beyond[:1] == "_" else beyond[:1]
    mark = neighbour != "" and unicodedata.category(neighbour).startswith("M")
    if mark and rightwards:
        return True
    if not mark and not neighbour.isalnum():
        return False
    if _HANGUL.match(edge) and _HANGUL.match(neighbour):
        return not rightwards
    return not (_UNSPACED.match(edge) or _UNSPACED.match(neighbour))
