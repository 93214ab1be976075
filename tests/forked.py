"""Another process for a test: a fork of this one, which has imported torch already."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

FORK = multiprocessing.get_context("fork")


def forked(body: Callable[..., None], *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that runs `body` with the arguments and an end of a pipe, and the other end; it ends with this one.

    Tensors cannot go through the pipe: torch would send where they are in memory that is gone with the process.
    """
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=body, args=(*arguments, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours
