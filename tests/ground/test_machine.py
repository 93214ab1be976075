"""Memory that runs out is told from other failures, and free memory is found."""

from __future__ import annotations

import os

import pytest

from tl_trainer.errors import RunError
from tl_trainer.ground import machine
from tl_trainer.ground.machine import cores, free_memory, is_out_of_memory, require_memory


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a convolution forward propagation"), False),
        (OSError(28, "No space left on device"), False),
        (FileNotFoundError(2, "No such file or directory", "out of memory/a.jpg"), False),
        (ValueError("damaged"), False),
    ],
)
def test_out_of_memory_has_many_words(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_too_little_memory_to_begin_with_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that start later take memory which nobody can be told is missing: the system aborts the process."""
    require_memory()
    monkeypatch.setattr(machine, "_SPARE", 1 << 62)
    with pytest.raises(RunError, match=r"^out of memory: .* close other programs"):
        require_memory()


def test_free_memory() -> None:
    assert 10_000_000 < free_memory() < 10**14


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_only_the_cores_that_this_process_may_use_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert cores() == 3
