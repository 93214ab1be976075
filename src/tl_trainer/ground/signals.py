"""A request to stop at the next safe point, and SIGINT and SIGTERM as such a request."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nobody waits for it as a request; like Ctrl-C no `except Exception` holds it up."""


def raise_terminated(number: int, _: FrameType | None) -> None:
    """A handler for SIGTERM."""
    raise Terminated


class StopRequest:
    """Whether a run shall stop: `signal` is the number of the signal that asks for it, None while nothing does.

    Within the `with` block the first of `signals` sets it, and a second one stops at once. Python allows handlers in
    the main thread only; without any `signals` it is a request for whoever sets `signal`.
    """

    def __init__(self, signals: Sequence[int] = ()) -> None:
        self.signal: int | None = None
        self._signals = signals
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in self._signals:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = number
