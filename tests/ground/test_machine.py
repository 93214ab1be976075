"""Memory that runs out is told from other failures, and free memory is found."""

from __future__ import annotations

import os
from pathlib import Path

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


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".", 1)).write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ("0::/", 700),
        ("0::/pod/box", 250),  # the group above it has the lower limit
        ("0::/elsewhere", 700),  # such a group is not seen in this container, whose own is the root
        ("3:cpu:/\n7:memory,pids:/box", 350),
        ("7:memory:/elsewhere", 1024),
        ("3:cpu:/", 1024),
        ("", 1024),
    ],
)
def test_in_a_container_free_memory_is_what_its_limit_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, expected: int
) -> None:
    write(tmp_path, meminfo="MemTotal: 9 kB\nMemAvailable: 1 kB", own=own)
    groups = tmp_path / "groups"
    write(groups, memory__max=1000, memory__current=400, memory__stat="anon 5\ninactive_file 100\nfile 9")
    write(groups / "pod", memory__max=900, memory__current=650, memory__stat="inactive_file 0")
    write(groups / "pod" / "box", memory__max="max", memory__current=1, memory__stat="inactive_file 0")
    write(groups / "memory" / "box", memory__limit_in_bytes=500, memory__usage_in_bytes=200,
          memory__stat="inactive_file 1\ntotal_inactive_file 50")  # fmt: skip
    for name, path in (("_MEMINFO", "meminfo"), ("_OWN_CGROUPS", "own"), ("_CGROUPS", "groups")):
        monkeypatch.setattr(machine, name, tmp_path / path)
    assert free_memory() == expected


def test_more_used_than_the_limit_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, own="0::/", memory__max=1, memory__current=2, memory__stat="inactive_file 0")
    monkeypatch.setattr(machine, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path)
    assert free_memory() == 0


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no affinity on this system")
def test_only_the_cores_that_this_process_may_use_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5})
    assert cores() == 3
