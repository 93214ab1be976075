"""What this process may use of the machine: processor cores and memory, and whether an error means that it ran out."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tl_trainer.errors import RunError

if TYPE_CHECKING:
    import torch

_NO_MEMORY = (
    "out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory", "bad_alloc",
    "can't start new thread",
)  # fmt: skip
# oneDNN's words, the whole of them: where it cannot do what it was asked for, it has no *descriptor* of a primitive.
_NO_MEMORY_IN_ONEDNN = (
    "could not create a primitive", "could not create a memory object", "could not execute a primitive"
)  # fmt: skip
_SPARE = 256 << 20  # bytes, without which hardly a step of a network can work
_MEMINFO, _OWN_CGROUPS, _CGROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_TRYING = threading.Lock()
_SMALL_STEP = 50_000_000  # multiply-adds


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory has run out, in the words of Python, torch, its libraries or the system.

    Call this before reporting a file as damaged: reading also fails when memory runs out.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, MemoryError) or text in _NO_MEMORY_IN_ONEDNN or any(words in text for words in _NO_MEMORY)


def require_memory() -> None:
    """Raise RunError where so little memory is left that the system would abort the process for want of it."""
    if memory_is_short():
        raise RunError(
            f"out of memory: fewer than {_SPARE >> 20} MB are left for the network; close other programs, or raise the "
            "limit on this one (ulimit -v)"
        )


def memory_is_short() -> bool:
    """Whether hardly any memory is left, found by asking for some. Untouched pages of zeros cost addresses only."""
    with _TRYING:  # two threads that ask at once would take it from each other
        try:
            bytes(_SPARE)
        except MemoryError:
            return True
    return False


def free_memory() -> int:
    """The bytes of memory that are free for use, caches of the system counted in; 4 GB where that is unknown.

    In a container it is what its limit leaves, where that is less than what the machine has; of several ranks on a host
    each may use its part.
    """
    left = list(_left_by_limits())
    if _MEMINFO.exists():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                left.append(int(line.split()[1]) * 1024)
    return max(0, min(left, default=4_000_000_000)) // _sharers()


def _left_by_limits() -> Iterator[int]:
    """What each limit on this process's memory leaves: of its control group and of all above it (cgroup v2 and v1)."""
    lines = _OWN_CGROUPS.read_text().splitlines() if _OWN_CGROUPS.exists() else []
    for number, controllers, path in (line.split(":", 2) for line in lines if line):
        if number == "0" and not controllers:
            root, limit, usage, cache = _CGROUPS, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = _CGROUPS / "memory", *_VERSION_1
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents[: len(group.parts) - len(root.parts)]):
            with contextlib.suppress(OSError, ValueError):  # such a group is not seen from here, or its limit is "max"
                numbers = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                bytes_used = int((folder / usage).read_text()) - int(numbers.get(cache, 0))
                yield int((folder / limit).read_text()) - bytes_used


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has used so far, on a GPU those of tensors on it; 0 where that is unknown."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """How long the work takes, with what it has a GPU do."""
    started = time.perf_counter()
    work()
    if device.type != "cpu":
        import torch

        torch.accelerator.synchronize(device)
    return time.perf_counter() - started


def cores() -> int:
    """The processor cores that this process may use; of several ranks on a host each its part."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, there // _sharers())


def _sharers() -> int:
    """How many processes torchrun has started on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


@contextlib.contextmanager
def threads_for(multiply_adds: int) -> Iterator[None]:
    """One thread within the block for steps that take microseconds: waking the others costs more than they save, above
    all on a machine that has other work to do."""
    import torch

    before = torch.get_num_threads()
    if multiply_adds < _SMALL_STEP:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
