"""What torch and the system say in their own words becomes a sentence with a remedy, and nothing else does."""

from __future__ import annotations

import errno

import pytest
import torch

from tl_trainer.errors import DataError, RunError
from tl_trainer.ground.failures import (
    NO_SHARED_MEMORY,
    WORKER_KILLED,
    as_trainer_error,
    in_sentences,
    is_worker_death,
    worker_death,
)

KNOWN = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "the GPU is out of memory; lower --batch-size"),
    (MemoryError(), "out of memory; lower --batch-size, or the number of --workers"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory; lower --batch-size"),
    (ImportError("x.so: failed to map segment from shared object"), "x.so: failed to map segment .* \\(ulimit -v\\)"),
    (OSError(errno.ENAMETOOLONG, "File name too long", "a" * 999), "'a+\\.\\.\\.a+': File name too long"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "was killed, perhaps because memory"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. "), r"--shm-size"),
]


@pytest.mark.parametrize(("error", "sentence"), KNOWN, ids=range(len(KNOWN)))
def test_a_known_failure_is_a_run_error_with_its_remedy(error: Exception, sentence: str) -> None:
    with pytest.raises(RunError, match=sentence) as raised, in_sentences():
        raise error
    assert raised.value.__cause__ is error
    assert raised.value.exit_code == 1
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "error",
    [ValueError("shapes"), KeyError("x"), OSError(errno.EIO, "Input/output error"), RuntimeError("cuDNN error")],
)
def test_what_nobody_recognises_is_raised_as_it_is(error: Exception) -> None:
    assert as_trainer_error(error) is None
    with pytest.raises(type(error)) as raised, in_sentences():
        raise error
    assert raised.value is error


def test_a_sentence_stays_as_it_is() -> None:
    told = DataError("no such folder")
    assert as_trainer_error(told) is told
    with pytest.raises(DataError) as raised, in_sentences():
        raise told
    assert raised.value is told


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_stops_the_program_is_no_failure(stop: type[BaseException]) -> None:
    with pytest.raises(stop) as raised, in_sentences():
        raise stop
    assert raised.value.__cause__ is None


def test_a_system_without_words_is_quoted_by_its_number() -> None:
    told = as_trainer_error(OSError(errno.EMFILE, None, "photos/a.jpg"))
    assert str(told) == "'photos/a.jpg': EMFILE"


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("DataLoader worker (pid(s) 7) exited unexpectedly", WORKER_KILLED),
        ("DataLoader worker (pid 7) is killed by signal: Killed.", WORKER_KILLED),
        ("DataLoader worker (pid 7) is killed by signal: Bus error.", NO_SHARED_MEMORY),
        ("DataLoader worker (pid 7) is killed ... you might want to increase the shared memory", NO_SHARED_MEMORY),
        ("Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback", None),
        ("Caught ValueError: Bus error, shared memory", None),
    ],
)
def test_what_a_worker_raised_is_not_its_death(message: str, said: str | None) -> None:
    assert worker_death(RuntimeError(message)) == said
    assert is_worker_death(RuntimeError(message)) == (said is not None)
    assert worker_death(ValueError(message)) is None
    assert not is_worker_death(ValueError(message))
