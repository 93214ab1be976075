"""Progress bars and a status line on stderr, for those who asked for them: the commands do, the api does not."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TypeVar

Item = TypeVar("Item")
_shown = ContextVar("shown", default=False)


@contextlib.contextmanager
def bars(shown: bool) -> Iterator[None]:
    """Whether bars are drawn within the block, by this thread; never where stderr is no terminal."""
    token = _shown.set(shown)
    try:
        yield
    finally:
        _shown.reset(token)


def bars_shown() -> bool:
    """Whether bars are drawn."""
    return _shown.get()


def bar(
    items: Iterable[Item], description: str, total: int | None = None, *, start: int = 0, unit: str = "batch"
) -> Iterable[Item]:
    """The items, with a bar that moves as they are taken."""
    if not _shown.get():
        return items
    from tqdm import tqdm

    return tqdm(items, description, total, initial=start, leave=False, unit=unit, disable=None)


class StatusLine:
    """A line at the bottom of the terminal that is written over; there is none where no bars are drawn."""

    def __init__(self) -> None:
        self._bar: Any = None

    @property
    def possible(self) -> bool:
        """Whether stderr is a terminal on which bars are drawn."""
        return bars_shown() and sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Write it over what was there, ten times a second at the most."""
        if first := self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(bar_format="{desc}", leave=False)
        self._bar.set_description_str(text, refresh=first)
        self._bar.update()

    def close(self) -> None:
        """Leave nothing of it."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
