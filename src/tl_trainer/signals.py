"""SIGINT and SIGTERM as a request to stop at the next safe point."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, where nobody waits for it as a request; like Ctrl-C no `except Exception` holds it up."""


def raise_terminated(number: int, _: FrameType | None) -> None:
    """A handler for SIGTERM."""
    raise Terminated


class StopRequest:
    """Within the `with` block the first Ctrl-C or SIGTERM only sets `signal`; a second one stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self.signal = number
