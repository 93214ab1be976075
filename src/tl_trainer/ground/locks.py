"""Folders that one process holds at a time."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from tl_trainer.errors import InputError

log = logging.getLogger(__name__)

_held: set[int] = set()


def _let_go() -> None:
    """In a forked process: a loader's worker may outlive the run that was killed, and must not hold its folder."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def sole_use(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder for this process; where another one holds it, `wait` for that or raise InputError.

    Gives whether it is held: Windows and some file systems have no such lock.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor, held = os.open(folder, os.O_RDONLY), True
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(f"{folder}: another tl-train is at work in it; wait for it, or end it first") from None
            log.info("waiting for another process that is at work in %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            log.debug("%s cannot be locked", folder)
            held = False
        yield held
    finally:
        if descriptor in _held:  # not in a worker, where the generator may end too
            _held.remove(descriptor)
            os.close(descriptor)
