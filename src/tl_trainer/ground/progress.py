"""Progress bars on stderr, for those who asked for them: the commands do, the api does not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import TypeVar

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
