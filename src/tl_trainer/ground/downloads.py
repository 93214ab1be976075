"""Downloads that cannot stand still for ever."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

STALL_SECONDS = 25


@contextlib.contextmanager
def stall_timeout() -> Iterator[None]:
    """Within the block a download that stands still ends; torch's and torchvision's have no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
