"""When an answer counts as right: exact, contains, regex:PATTERN or python:module:function."""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from opcd.errors import InputError

Scorer = Callable[[str, Sequence[str]], bool]  # (completion, accepted answers) -> right?


def load_scorer(spec: str) -> Scorer:
    """The scorer that `spec` names.

    - ``exact``: equal to an accepted answer; white space, case and final punctuation ignored.
    - ``contains``: holds an accepted answer, as whole words; white space and case ignored.
    - ``regex:PATTERN``: the text that PATTERN finds in the completion (its first group, where it
      has one) equals an accepted answer as under ``exact``.
    - ``python:module:function``: ``function(completion, answers)`` of an importable module, also
      one in the current folder; its truth value counts.

    Raises InputError for a scorer that does not exist, compile or import.
    """
    if spec == "exact":
        return exact
    if spec == "contains":
        return contains
    kind, _, rest = spec.partition(":")
    if kind == "regex" and rest:
        try:
            pattern = re.compile(rest, re.DOTALL)
        except re.error as error:
            raise InputError(
                f"scorer regex:PATTERN must be a valid regular expression, got {rest!r}: {error}"
            ) from error
        return lambda completion, answers: _match(pattern, completion, answers)
    if kind == "python" and rest:
        return _import_scorer(rest)
    raise InputError(
        f"scorer must be exact, contains, regex:PATTERN or python:module:function, got {spec!r}"
    )


def exact(completion: str, answers: Sequence[str]) -> bool:
    """Equal to one of the answers, apart from white space, case and final punctuation."""
    return _bare(completion) in {_bare(answer) for answer in answers}


def contains(completion: str, answers: Sequence[str]) -> bool:
    """Holds one of the answers as whole words, apart from white space and case."""
    text = " ".join(completion.casefold().split())
    return any(
        re.search(rf"(?<!\w){re.escape(' '.join(answer.casefold().split()))}(?!\w)", text)
        for answer in answers
    )


def _bare(text: str) -> str:
    text = " ".join(text.casefold().split())
    return text.rstrip(".!?,;: ") or text


def _match(pattern: re.Pattern[str], completion: str, answers: Sequence[str]) -> bool:
    found = pattern.search(completion)
    if found is None:
        return False
    return exact(found.group(1 if pattern.groups else 0) or "", answers)


def _import_scorer(target: str) -> Scorer:
    module_name, _, function_name = target.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises
        raise InputError(
            f"scorer python:{target} must name an importable module, got {type(error).__name__}: "
            f"{error}; run from the folder that holds {module_name.split('.')[0]}.py, or install it"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(
            f"scorer python:{target} must name a function of {module.__file__}, which has no "
            f"{function_name!r}; write python:module:function(completion, answers)"
        )

    def score(completion: str, answers: Sequence[str]) -> bool:
        try:
            return bool(function(completion, answers))
        except Exception as error:  # whatever the user's function raises
            raise InputError(
                f"scorer python:{target} must take (completion, answers), but it raised "
                f"{type(error).__name__}: {error} for {completion!r} and {list(answers)}"
            ) from error

    return score
