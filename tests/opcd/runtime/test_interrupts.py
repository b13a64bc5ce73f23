"""A signal is kept until a step is done; the next one does what it did before."""

import signal
from collections.abc import Iterator

import pytest

from opcd.runtime.interrupts import SIGNALS, Ended, Interrupts, raised


@pytest.fixture(params=SIGNALS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_the_first_signal_is_caught_and_the_second_is_the_callers(number: signal.Signals) -> None:
    callers: list[int] = []
    signal.signal(number, lambda caught, _: callers.append(caught))
    told: list[str] = []
    with Interrupts(told.append) as interrupts:
        assert interrupts.caught is None
        signal.raise_signal(number)
        assert (interrupts.caught, callers, len(told)) == (number, [], 1)
        signal.raise_signal(number)
        assert (callers, len(told)) == ([number], 1)
    signal.raise_signal(number)
    assert callers == [number, number]


def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Interrupts(lambda _: None) as interrupts:
        signal.raise_signal(number)
        assert interrupts.caught is None


@pytest.mark.parametrize("number", [s for s in SIGNALS if s != signal.SIGINT], ids=str)
def test_the_end_of_a_job_is_raised(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Ended) as caught, raised():
            signal.raise_signal(number)
        assert caught.value.number == number
        assert isinstance(caught.value, KeyboardInterrupt)
        assert signal.getsignal(number) == signal.SIG_DFL
        callers: list[int] = []
        signal.signal(number, lambda given, _: callers.append(given))
        with raised():  # a caller's own handler stays
            signal.raise_signal(number)
        assert callers == [number]
    finally:
        signal.signal(number, before)
