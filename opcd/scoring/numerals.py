"""The numbers in a text, as people write them; texts are `texts.normalised`."""

import re
from fractions import Fraction
from typing import NamedTuple

from opcd.scoring.texts import unemphasised

_MAX_DIGITS = 60  # of a numeral
_MAX_POWER = 400
_OF_FRACTION = r"\s*(?:\{([^{}]+)\}|(\d))"
_LATEX = tuple(
    (re.compile(pattern), plain)
    for pattern, plain in (
        (r"\\([$%])", r"\1"),
        (r"\{([.,])\}", r"\1"),  # 1{,}000
        (r"\\!", ""),  # 1,\!000
        (r"\\[,:; ]|(?<=\d)~(?=\d)", " "),  # 10\,000
        (r"\\times|\\cdot", "×"),
        (r"\^\{([-+]?\d+)\}", r"^\1"),
        (r"(?<=\d)\s*(?=\\[dt]?frac)", " "),  # 1\frac12
        (rf"\\[dt]?frac{_OF_FRACTION}{_OF_FRACTION}", r"\1\2/\3\4"),
    )
)
_NUMERAL = re.compile(
    r"""
    (?:(?<![\w)\]%])(?P<sign>[-+])(?=[$€£¥₹]?[\d.]))?[$€£¥₹]?
    (?<![A-Za-zÀ-ɏͰ-ԯ\d^_])(?<!\d[.,:/'])
    (?:(?P<whole>\d+)[ ](?=\d+/\d))?                                 # of 1 1/2
    (?P<digits>\d{1,3}(?:[ ]\d{3})+(?!\d)(?:[.,]\d+)?|\d+(?:[.,']\d+)*|\.\d+)
    (?:e(?P<exponent>[-+]?\d+)|[ ]?[x*×·][ ]?10\^(?P<ten>[-+]?\d+)|\^(?P<power>[-+]?\d+))?
    (?:[ ]?/[ ]?(?P<divisor>\d+))?
    (?P<more>(?:[:/]\d+)+)?                                          # a date, a time, a ratio
    (?P<percent>[ ]?%)?
    """,
    re.VERBOSE | re.IGNORECASE,
)
# What may stand around an accepted number: units, currency, a sentence, LaTeX that sets it.
_SETTING = re.compile(
    r"\\(?:boxed|text(?:bf|it|rm)?|math(?:bf|it|rm)|left|right|displaystyle)(?![a-zA-Z])"
    r"|\^\{?\\circ\}?|\\[()\[\]]|(?<=[A-Za-z}])\^[-+]?\d|\*\*"  # 90^\circ, \[ \], cm^2
)
_MATHEMATICS = re.compile(
    r"[\\^√π∞∑∏∫±×÷·*<>≤≥≠≈+~|!]|\b(?:sqrt|log|ln|exp|sin|cos|tan|pi|mod)\b"
    r"|\b(?:dozen|hundred|thousand|million|billion|trillion)\b",
    re.IGNORECASE,
)
_MARKS = ((",", "."), (".", ","), ("'", "."), ("'", ","), (" ", "."), (" ", ","))


class Numeral(NamedTuple):
    """A number as it is written. 1.000 has two readings, 1 and 1000; a date or a time has none."""

    readings: tuple[Fraction, ...]  # the likeliest first: a comma before three digits groups them
    percent: bool

    def says(self, accepted: "Numeral") -> bool:
        """Whether one of its readings is the accepted number's first; 10 % may be 10 or 0.1."""
        if not accepted.readings:
            return False
        wanted = accepted.readings[0]
        scale = 1 if self.percent == accepted.percent else 100 if self.percent else Fraction(1, 100)
        return wanted in self.readings or wanted * scale in self.readings


def numerals(text: str) -> list[Numeral]:
    """Those of a text, in its order. Digits that go on a word are none: B12, x2."""
    return [_numeral(found) for found in _NUMERAL.finditer(_plain(text))]


def is_one_number(text: str) -> bool:
    """Whether a text holds one number, maybe in a sentence or with its unit, and no mathematics
    beyond it: not 3π, 6 - 5i or x = 7, y = 2. Of a worked solution counts what ``####`` marks."""
    text = _plain(text.rpartition("####")[2])
    found = [*_NUMERAL.finditer(text)]
    if len(found) != 1:
        return False
    front, back = text[: found[0].start()], text[found[0].end() :]
    variable = re.match(r" ?[inxyz](?!\w)", back)
    return not variable and not any(
        _MATHEMATICS.search(_SETTING.sub(" ", side)) for side in (front, back)
    )


def only_numeral(text: str) -> Numeral | None:
    """The number that a text is and nothing else; 007 is a code, no number."""
    found = _NUMERAL.fullmatch(text)
    if found is None or re.match(r"0\d", found["digits"]):
        return None
    numeral = _numeral(found)
    return numeral if numeral.readings else None


def _plain(text: str) -> str:
    text = unemphasised(text)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def _numeral(found: re.Match[str]) -> Numeral:
    percent = found["percent"] is not None
    if found["more"] or len(found[0]) > _MAX_DIGITS:
        return Numeral((), percent)
    power, ten = int(found["power"] or 1), int(found["exponent"] or found["ten"] or 0)
    whole, divisor = int(found["whole"] or 0), int(found["divisor"] or 1)
    if divisor == 0 or max(abs(power), abs(ten)) > _MAX_POWER:
        return Numeral((), percent)
    sign = -1 if found["sign"] == "-" else 1
    readings = [
        sign * (whole + value**power * Fraction(10) ** ten / divisor)
        for value in _readings(found["digits"])
        if value or power > 0
    ]
    return Numeral(tuple(readings), percent)


def _readings(digits: str) -> list[Fraction]:
    readings = []
    for thousands, point in _MARKS:
        whole, _, decimals = digits.partition(point)
        first, *groups = whole.split(thousands)
        grouped = not groups or (
            re.fullmatch(r"[1-9]\d{0,2}", first)
            and len(groups[-1]) == 3
            and all(len(g) == 3 or (thousands, len(g)) == (",", 2) for g in groups)  # 1,00,000
        )
        figures = first + "".join(groups)
        if grouped and (figures + decimals).isdecimal():
            value = Fraction(f"{figures or 0}.{decimals or 0}")
            if value not in readings:
                readings.append(value)
    return readings
