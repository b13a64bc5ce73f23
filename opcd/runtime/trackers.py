"""Where a run's metrics go beside metrics.jsonl: TensorBoard, or a function of the user's."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from opcd.errors import InputError
from opcd.runtime.user_code import load_function, raised

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What takes a step's metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """The metrics of a step, numbers by name; those of a validation as "validation/NAME"."""
        ...

    def close(self) -> None:
        """The run ends."""
        ...


class TensorBoard:
    """Scalars in the run's folder, for `tensorboard --logdir`."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise InputError(
                "trackers must be installed, got tensorboard without its package; pip install "
                "tensorboard, or leave it out"
            ) from error
        self._writer = SummaryWriter(str(folder / "tensorboard"))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker.log."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """See Tracker.close."""
        self._writer.close()


def open_trackers(names: str, folder: Path) -> list[Tracker]:
    """Those that `names` lists, separated by commas: ``tensorboard``, ``python:FILE.py:function``.

    A function gets the run's folder, and returns a `Tracker`. Raises InputError for another name.
    """
    return [_open(name, folder) for name in map(str.strip, names.split(",")) if name]


def numbers(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers among metrics, those inside of others with their name in front."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            found[f"{prefix}{name}"] = value
    return found


def log_all(trackers: list[Tracker], metrics: Mapping[str, Any]) -> None:
    """Hand a step's metrics to every tracker; one that raises is said, and gets no more."""
    values = numbers(metrics)
    trackers[:] = [tracker for tracker in trackers if _logged(tracker, metrics["step"], values)]


def close_all(trackers: Sequence[Tracker]) -> None:
    """Close every tracker; one that raises is said, and ends no run."""
    for tracker in trackers:
        _close(tracker)


def _close(tracker: Tracker) -> None:
    try:
        tracker.close()
    except Exception as error:  # whatever the user's own raises
        log.warning("a tracker was not closed: %s: %s", type(error).__name__, error)


def _logged(tracker: Tracker, step: int, values: Mapping[str, float]) -> bool:
    try:
        tracker.log(step, values)
    except Exception as error:  # whatever the user's own raises
        log.warning("a tracker is left out from here on: %s: %s", type(error).__name__, error)
        _close(tracker)
        return False
    return True


def _open(name: str, folder: Path) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(folder)
    if name.startswith("python:"):
        make = load_function(name.removeprefix("python:"), f"tracker {name}")
        try:
            made = make(folder)
        except Exception as error:  # whatever the user's own raises
            raise InputError(
                f"tracker {name} must return an object with log(step, values) and close(), but it "
                f"raised {raised(error)}; correct it, or leave it out"
            ) from error
        if not (callable(getattr(made, "log", None)) and callable(getattr(made, "close", None))):
            raise InputError(
                f"tracker {name} must return an object with log(step, values) and close(), got "
                f"{type(made).__name__}"
            )
        return made
    raise InputError(
        f"trackers must be tensorboard or python:FILE.py:function, got {name!r}; metrics.jsonl is "
        f"always written"
    )
