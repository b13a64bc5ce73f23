"""What a log says of a phase while it runs."""

import time

import pytest

from opcd.terminal import _Lines


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that there is, as its only item."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def told(lines: _Lines, capsys: pytest.CaptureFixture[str]) -> str:
    lines.part("well")
    return capsys.readouterr().out


def test_what_is_left_is_not_counted_by_the_first_part(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """It samples what every step shares: 192 s, where the others take 15."""
    lines = _Lines("distil", 24, 0)
    clock[0] += 192
    assert told(lines, capsys) == "distil 1/24, the first in 3 min: well\n"
    for _ in range(2):
        clock[0] += 15
        said = told(lines, capsys)
    assert said == "distil 3/24, 15.0 s each, about 5 min left: well\n"


def test_a_phase_that_goes_on_and_its_last_part(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = _Lines("distil", 24, 21)
    clock[0] += 40
    assert told(lines, capsys) == "distil 22/24, the first in 40 s: well\n"
    clock[0] += 10
    assert told(lines, capsys) == ""  # not yet again
    clock[0] += 12
    assert told(lines, capsys) == "distil 24/24, 11.0 s each: well\n"


def test_a_phase_of_one_part(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    lines = _Lines("evaluate", 1, 0)
    clock[0] += 3
    assert told(lines, capsys) == "evaluate 1/1, the first in 3 s: well\n"
