"""Functions and classes of a user's own: ``module:function`` or ``path/to/file.py:function``."""

import contextlib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import opcd
from opcd.errors import InputError


def load_function(target: str, what: str, kind: str = "function") -> Callable[..., Any]:
    """The function, or another `kind` of callable, that `target` names; a module may lie in the
    current folder.

    Raises InputError, which begins with `what`, where there is none.
    """
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise InputError(
            f"{what} must name a file and a {kind}, python:FILE.py:{kind}, or a module's, "
            f"python:module:{kind}"
        )
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else _by_name(place)
    except (Exception, SystemExit) as error:  # whatever the user's module raises
        raise InputError(
            f"{what} must name an importable module, got {type(error).__name__}: {error}; name "
            f"its file, python:path/to/file.py:{name}, or install it"
            if not place.endswith(".py")
            else f"{what} must name a file that can be imported, got {type(error).__name__}: "
            f"{error}; correct it"
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = f"in which {name} is {function!r:.60}" if hasattr(module, name) else None
        raise InputError(
            f"{what} must name a {kind} of {place} "
            f"({getattr(module, '__file__', None) or 'built in'}), "
            f"{there or f'which has no {name!r}'}; define it"
        )
    return function


def raised(error: BaseException) -> str:
    """What a user's code raised, and where in it."""
    ours = Path(opcd.__file__).parent
    for frame in traceback.extract_tb(error.__traceback__):
        file = Path(frame.filename)
        if not file.is_relative_to(ours):
            return f"{type(error).__name__}: {error} (line {frame.lineno} of {file.name})"
    return f"{type(error).__name__}: {error}"


def located(target: str, folder: Path) -> str:
    """`target` with a file's path made absolute, as it is found from `folder`."""
    place, colon, name = target.rpartition(":")
    if not place.endswith(".py"):
        return target
    return f"{(folder / Path(place).expanduser()).absolute()}{colon}{name}"


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    name = f"opcd_user_{path.stem}_{abs(hash(path.resolve())):x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up
    try:
        with _importable(str(path.parent.resolve())):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _by_name(name: str) -> ModuleType:
    with _importable(str(Path.cwd())):
        return importlib.import_module(name)


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Modules in `folder` can be imported within it."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
