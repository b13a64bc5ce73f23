"""When an answer counts: built-in scorers, and a function of the user's."""

import hashlib
import inspect
import re
import sys
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from opcd.errors import InputError
from opcd.runtime.strict_json import NO_JSON
from opcd.runtime.user_code import load_function, raised
from opcd.scoring.calls import Call, accepted_calls, calls_in, same_calls
from opcd.scoring.choices import claimed, letter
from opcd.scoring.numerals import is_one_number, numerals, only_numeral
from opcd.scoring.reasoning import split_thought
from opcd.scoring.texts import bare, folded, holds, normalised
from opcd.scoring.values import read_value


class Score(NamedTuple):
    """What a completion got."""

    value: float  # from 0 to 1; of a function's rates their mean
    rates: dict[str, float]  # by name, each from 0 to 1; {} for a single value


class Judged(NamedTuple):
    """All that a scorer may look at; a user's function gets what it names."""

    completion: str  # what stands behind its reasoning; "" where a thought was not ended
    answers: Sequence[str]  # that are accepted; () where there are none
    raw: str  # the completion with its special tokens and its reasoning
    prompt: Sequence[Mapping[str, Any]]  # the request's messages
    teacher_answer: str  # what the prompted model says to the request


@dataclass(frozen=True)
class Scorer:
    """Judges completions: ``scorer(completion, accepted answers) -> Score``."""

    spec: str  # as in the configuration
    judge: Callable[[Judged], Score]
    # Why an accepted answer can never be found right, or None; a user's function is not asked.
    fault: Callable[[str], str | None] | None
    judges_raw: bool = False
    needs_answers: bool = True  # else requests without accepted answers are judged as well
    source: str = ""  # of the file with the user's function
    hears_teacher: bool = False  # what is right depends on what the prompted model says
    _rates: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False)

    @property
    def reads_raw(self) -> bool:
        """Whether special tokens matter to it."""
        return self.judges_raw or self.spec == "calls"

    @property
    def identity(self) -> str:
        """What tells scorers apart: of a user's function its name and the text of its file."""
        if not self.source:
            return self.spec
        digest = hashlib.sha256(self.source.encode()).hexdigest()
        return f"python:{self.spec.rpartition(':')[2]} of {digest}"

    def __call__(
        self,
        completion: str,
        answers: Sequence[str],
        raw: str | None = None,
        prompt: Sequence[Mapping[str, Any]] = (),
        teacher_answer: str = "",
    ) -> Score:
        """Score what stands behind the completion's reasoning; an unended thought gets 0.

        raw, prompt, teacher_answer: see `Judged`, for a scorer that asks for them.
        Raises InputError for rates with other names than an earlier completion of the same request
        and accepted answers got: means over completions would leave out what each did not reach.
        """
        answer = split_thought(completion).answer
        raw = completion if raw is None else raw
        found = self.judge(Judged(answer or "", answers, raw, prompt, teacher_answer))
        now = sorted(found.rates)
        if now != (before := self._rates.setdefault(repr((answers, prompt)), now)):
            raise InputError(
                f"scorer {self.spec} must name the same rates whatever the completion, got "
                f"{before} and for {completion!r} {now}, both for {list(answers)}; give 0 to a "
                f"rate that was not reached"
            )
        if answer is None and not self.judges_raw:
            return Score(0.0, dict.fromkeys(found.rates, 0.0))
        return found


def load_scorer(spec: str) -> Scorer:
    """The scorer that `spec` names; all judge what stands behind a completion's reasoning.

    Texts are compared as `texts.normalised`: spelling, quotes, dashes and invisible characters do
    not matter.

    - ``exact``: equals an accepted answer, apart from case, final punctuation, quotes or markup
      around it, and thousands separators.
    - ``contains``: holds an accepted answer: as whole words, inside the line for scripts without
      spaces (in Korean at the front of a word), with its case where it is all capitals. A number
      is held as a whole one: 42 not in -42, 42.5 or 42 %. An answer that names every label holds
      the right one: the scorecard counts such answers.
    - ``number``: its last number equals the accepted one, see `numerals`.
    - ``choice``: claims the accepted letter and no other, see `choices`.
    - ``json``: is JSON, or one fence with JSON in it, and equals an accepted value: 1 is 1.0, keys
      have no order, nothing else may stand around it.
    - ``math``: equals an accepted expression, as the package math-verify compares them (LaTeX,
      fractions, sets).
    - ``calls``: makes the accepted call ``{"name": ..., "arguments": {...}}``, or the list of calls
      in whatever order, or none where the accepted answer is text without any; see `calls` for the
      forms that are read. Four rates: called when needed, right tool, right arguments (as under
      ``json``), not called without need.
    - ``regex:PATTERN``: the first text that PATTERN (its group, where it has one) finds in the
      answer as it is written equals an accepted answer as under ``exact``; ``regex-last:PATTERN``
      takes the last. Case matters in the pattern, and ``.`` ends at a line's end.
    - ``python:FILE.py:function`` or ``python:module:function``: a function of a file, or of an
      importable module, also one in the current folder. It gets what its parameters name, see
      `Judged`: ``completion``, ``answers``, ``prompt``, ``teacher_answer``, ``raw`` (then it judges
      unended thoughts itself); two of other names get the completion and the answers. Without
      answers among them it also judges requests that have none. It returns a bool, 0 or 1, a number
      from 0 to 1, or a dict of such by the names of rates, which are the same whatever the
      completion.

    Raises InputError for a scorer that does not exist, compile or import.
    """
    kind, _, rest = spec.partition(":")
    if spec == "calls":
        return Scorer(spec, _judge_calls, _calls_fault)
    if spec == "math" and find_spec("math_verify") is None:
        raise InputError(
            "scorer math must have its package, got none; pip install math-verify, or take number"
        )
    if spec in _BUILT_IN:
        right, fault = _BUILT_IN[spec]
        return Scorer(spec, _alike(right), fault)
    if kind in ("regex", "regex-last") and rest:
        pattern = _compile(kind, rest)
        right = partial(_finds, pattern, -1 if kind == "regex-last" else 0)
        return Scorer(spec, _alike(right), partial(_regex_fault, pattern, right))
    if kind == "python" and rest:
        return _python_scorer(spec, rest)
    raise InputError(
        f"scorer must be {', '.join(_BUILT_IN)}, calls, regex:PATTERN, regex-last:PATTERN or "
        f"python:FILE.py:function, got {spec!r}; choose one"
    )


def _alike(right: Callable[[str, str], bool]) -> Callable[[Judged], Score]:
    """A judge that wants one of the accepted answers."""
    return lambda it: Score(float(any(right(it.completion, a) for a in it.answers)), {})


def _equals(answer: str, accepted: str) -> bool:
    return folded(bare(answer)) == folded(bare(accepted))


def _contains(answer: str, accepted: str) -> bool:
    wanted = only_numeral(bare(accepted))
    if wanted is None:
        return holds(answer, accepted)
    said = numerals(normalised(answer))
    return any(n.says(wanted) and n.percent == wanted.percent for n in said)


def _same_number(answer: str, accepted: str) -> bool:
    said, wanted = (numerals(normalised(text)) for text in (answer, accepted))
    return bool(said and wanted) and said[-1].says(wanted[-1])


def _same_choice(answer: str, accepted: str) -> bool:
    return claimed(answer) == {letter(accepted)}


def _same_json(answer: str, accepted: str) -> bool:
    try:
        return bool(read_value(answer) == read_value(accepted))
    except NO_JSON:
        return False


def _judge_calls(it: Judged) -> Score:
    """Calls are read with their special tokens, which some families mark them by."""
    made = calls_in(split_thought(it.raw).answer or "")
    wanted = [accepted_calls(accepted) for accepted in it.answers]
    best = max((_called(made, w) for w in wanted), key=lambda s: (s.value, fmean(s.rates.values())))
    # Where a call may be made and may not, none of the rates is asked for.
    return best if all(wanted) or not any(wanted) else Score(best.value, {})


def _called(made: list[Call], wanted: list[Call]) -> Score:
    if not wanted:
        rates = {"not called without need": float(not made)}
    else:
        tools = sorted(c.name for c in made) == sorted(c.name for c in wanted)
        rates = {
            "called when needed": float(bool(made)),
            "right tool": float(tools),
            "right arguments": float(same_calls(made, wanted)),
        }
    return Score(float(all(rates.values())), rates)


def _calls_fault(accepted: str) -> str | None:
    try:
        accepted_calls(accepted)
    except ValueError as error:
        return (
            f'it is {error}; write {{"name": ..., "arguments": {{...}}}} or a list of these, or '
            f"text where no call is wanted"
        )
    return None


def _same_mathematics(answer: str, accepted: str) -> bool:
    """math-verify says whether two expressions are equal: fractions, sets, LaTeX."""
    from math_verify import parse, verify

    return bool(verify(parse(accepted), parse(answer)))


def _fault(right: Callable[[str, str], bool], what: str, accepted: str) -> str | None:
    return None if right(split_thought(accepted).answer or "", accepted) else what


def _number_fault(accepted: str) -> str | None:
    what = "it ends in no number; write one, or take another scorer"
    if fault := _fault(_same_number, what, accepted):
        return fault
    if is_one_number(normalised(split_thought(accepted).answer or "")):
        return None
    return (
        "it is more than one number, and only a number would be compared; write that alone, or "
        "take the scorer exact, json or python:FILE.py:function"
    )


_BUILT_IN: dict[str, tuple[Callable[[str, str], bool], Callable[[str], str | None]]] = {
    name: (right, what if callable(what) else partial(_fault, right, what))
    for name, right, what in (
        ("exact", _equals, "it does not equal itself; leave reasoning out"),
        ("contains", _contains, "it is not found in itself; leave reasoning out"),
        ("number", _same_number, _number_fault),
        (
            "choice",
            _same_choice,
            "it is not one letter of the Latin, Greek or Cyrillic alphabet; write B, or take the "
            "scorer exact",
        ),
        ("json", _same_json, "it is no JSON; correct it, or take the scorer exact"),
        (
            "math",
            _same_mathematics,
            "math-verify does not find it equal to itself; write it as it reads one, such as "
            "$\\frac{1}{2}$",
        ),
    )
}


def _compile(kind: str, source: str) -> re.Pattern[str]:
    try:
        pattern = re.compile(source)
    except re.error as error:
        raise InputError(
            f"scorer {kind}:PATTERN must be a valid regular expression, got {source!r}: {error}; "
            f"correct it"
        ) from error
    if pattern.groups > 1:
        raise InputError(
            f"scorer {kind}:PATTERN must have at most one group, which is what is compared, got "
            f"{pattern.groups} in {source!r}; write the others as (?:...)"
        )
    return pattern


def _found(pattern: re.Pattern[str], text: str) -> list[str]:
    """What the pattern finds, its group where it has one; nothing empty."""
    return [t for found in pattern.finditer(text) if (t := found[pattern.groups])]


def _finds(pattern: re.Pattern[str], which: int, answer: str, accepted: str) -> bool:
    found = _found(pattern, answer)
    return bool(found) and _equals(found[which], accepted)


def _regex_fault(
    pattern: re.Pattern[str], right: Callable[[str, str], bool], accepted: str
) -> str | None:
    """A label alone is fine where the pattern's group could hold it, or looks at what is around."""
    source = _group_source(pattern)
    group = re.compile(source, pattern.flags | re.IGNORECASE)
    if right(accepted, accepted) or any(group.fullmatch(t) for t in (accepted, bare(accepted))):
        return None
    if re.search(r"\(\?<?[=!]", source):
        return None
    found = _found(pattern, accepted)
    what = f"finds {found[0]!r} in it" if found else "finds nothing in it, and cannot yield it"
    return f"the pattern {what}; write as the answer what the pattern finds, or change the pattern"


def _group_source(pattern: re.Pattern[str]) -> str:
    """What stands in the only group of a pattern; all of it where there is none."""
    source, comment = pattern.pattern, r"\(\?#[^)]*\)"
    if pattern.flags & re.VERBOSE:
        comment += r"|#[^\n]*"
    tokens = rf"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|{comment}|\(\?P<\w+>|\(\??|\)"
    begins: list[int | None] = []  # of the open groups; None: one that does not capture
    for token in re.finditer(tokens, source, re.DOTALL):
        if re.fullmatch(comment, token[0]):
            continue
        if token[0] == ")" and begins:
            if (begin := begins.pop()) is not None:
                return source[begin : token.start()]
        elif token[0].startswith("("):
            begins.append(None if token[0] == "(?" else token.end())
    return source


def _python_scorer(spec: str, target: str) -> Scorer:
    function = load_function(target, f"scorer {spec}")
    parameters = _parameters(function)
    named = [name for name in Judged._fields if name in parameters]
    by_name = "completion" in named
    wanted = named if by_name else [name for name in named if name != "answers"]

    def judge(it: Judged) -> Score:
        values = it._asdict()
        first = () if by_name else (it.completion, it.answers)
        about = f"{it.completion!r} and {list(it.answers)}"
        try:
            returned = function(*first, **{name: values[name] for name in wanted})
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            raise InputError(
                f"scorer {spec} must take (completion, answers), or by name what it needs of "
                f"{', '.join(Judged._fields)}, but it raised {raised(error)} for "
                f"{about}; correct it"
            ) from error
        return _as_score(returned, f"{spec} for {about}")

    needs_answers = not by_name or "answers" in named
    hears = "teacher_answer" in wanted
    return Scorer(spec, judge, None, "raw" in named, needs_answers, _source(target), hears)


def _source(target: str) -> str:
    """The text of the file that a function was loaded from; "" where there is none to read."""
    place = target.rpartition(":")[0]
    file = place if place.endswith(".py") else getattr(sys.modules[place], "__file__", None) or ""
    return Path(file).read_text("utf-8", "replace") if file.endswith(".py") else ""


def _parameters(function: Callable[..., Any]) -> list[str]:
    """The names that a function can be given values by; [] of one that is written in C."""
    try:
        found = inspect.signature(function).parameters.values()
    except ValueError:
        return []
    return [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _as_score(returned: Any, what: str) -> Score:
    named = isinstance(returned, dict)
    rates = {name: _rate(value) for name, value in (returned if named else {"": returned}).items()}
    values = {name: rate for name, rate in rates.items() if rate is not None}
    if values and len(values) == len(rates) and (not named or all(map(_is_name, values))):
        return Score(fmean(values.values()), values if named else {})
    if isinstance(returned, Coroutine):
        returned.close()
    raise InputError(
        f"a scorer must return a bool, 0 or 1, a number from 0 to 1, or a dict of such by name "
        f"(text of one line), got {returned!r} from {what}; return one of these"
        + (", from a function without async" if isinstance(returned, Awaitable) else "")
    )


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and name.strip() != ""


def _rate(value: Any) -> float | None:
    """A number from 0 to 1, also one of NumPy's or torch's; None for anything else."""
    if not isinstance(value, (bool, int, float)) and getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, (bool, int, float)) or not -1e-9 <= value <= 1 + 1e-9:
        return None
    return min(1.0, max(0.0, float(value)))
