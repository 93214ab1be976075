"""StopRequest: the first signal is a request, the second stops at once, and the handlers of before come back."""

from __future__ import annotations

import signal

import pytest

from tl_trainer.ground.signals import StopRequest, Terminated, raise_terminated

SIGNALS = [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_only_noted(number: signal.Signals) -> None:
    with StopRequest((signal.SIGINT, signal.SIGTERM)) as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number


@pytest.mark.parametrize("first", SIGNALS)
@pytest.mark.parametrize("second", SIGNALS)
def test_the_second_signal_stops_at_once(first: signal.Signals, second: signal.Signals) -> None:
    with StopRequest((signal.SIGINT, signal.SIGTERM)) as stop:
        signal.raise_signal(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(second)
        assert stop.signal == first


@pytest.mark.parametrize("failing", [False, True])
def test_the_handlers_of_before_come_back(failing: bool) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    stop = StopRequest((signal.SIGINT, signal.SIGTERM))
    assert [signal.getsignal(number) for number in SIGNALS] == before
    try:
        with stop:
            assert all(signal.getsignal(number) not in before for number in SIGNALS)
            if failing:
                raise ValueError
    except ValueError:
        pass
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_signal_that_nobody_waits_for_ends_what_is_going_on() -> None:
    before = signal.signal(signal.SIGTERM, raise_terminated)
    try:
        with pytest.raises(Terminated):
            try:
                signal.raise_signal(signal.SIGTERM)
            except Exception:
                pytest.fail("held up by an except Exception")
    finally:
        signal.signal(signal.SIGTERM, before)


def test_after_the_block_a_signal_interrupts_again() -> None:
    with StopRequest((signal.SIGINT, signal.SIGTERM)):
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
