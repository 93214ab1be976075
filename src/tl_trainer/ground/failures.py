"""What torch and the system only say in words of their own, as a sentence with the remedy."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator

from tl_trainer.errors import RunError, TrainerError
from tl_trainer.ground.machine import is_out_of_memory
from tl_trainer.ground.wording import shown

NO_SHARED_MEMORY = (
    "the shared memory (/dev/shm) is too small for the processes that load images; load in the main process with "
    "--workers 0, or give a container more with --shm-size"
)
WORKER_KILLED = "a process that loads images was killed, perhaps because memory ran out; try fewer with --workers"


def is_worker_death(error: BaseException) -> bool:
    """Whether torch says that a process of a DataLoader has died, which it may do at any moment."""
    return isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)  # not what a worker has raised


def worker_death(error: Exception) -> str | None:
    """What is to be said of a worker that died, from what torch said; None for another error."""
    if not is_worker_death(error):
        return None
    if "shared memory" in str(error) or "Bus error" in str(error):
        return NO_SHARED_MEMORY
    return WORKER_KILLED


def _gpu_memory(error: Exception) -> str | None:
    if type(error).__name__ == "OutOfMemoryError":  # torch's, without importing torch
        return "the GPU is out of memory; lower --batch-size or use --device cpu"
    return None


def _memory(error: Exception) -> str | None:
    return "out of memory; lower --batch-size, or the number of --workers" if is_out_of_memory(error) else None


def _mapping(error: Exception) -> str | None:
    if "failed to map segment" in str(error):  # the same words for a lack of memory and for a folder
        return f"{error}; close other programs or raise the limit on memory (ulimit -v), unless it is mounted noexec"
    return None


def _file(error: Exception) -> str | None:
    if isinstance(error, OSError) and error.filename is not None:  # such as a name that is too long for the system
        return f"{shown(error.filename)}: {error.strerror or errno.errorcode.get(error.errno or 0, '')}"
    return None


RECOGNISERS: tuple[Callable[[Exception], str | None], ...] = (_gpu_memory, _memory, _mapping, _file, worker_death)


def as_trainer_error(error: Exception) -> TrainerError | None:
    """The error as one that a user understands; None where nobody recognises it."""
    if isinstance(error, TrainerError):
        return error
    message = next(filter(None, (recognise(error) for recognise in RECOGNISERS)), None)
    return RunError(message) if message else None


@contextlib.contextmanager
def in_sentences() -> Iterator[None]:
    """Within the block what is recognised is raised as a TrainerError."""
    try:
        yield
    except Exception as error:
        told = as_trainer_error(error)
        if told is None or told is error:
            raise
        raise told from error
