"""The ranks: the processes that torchrun has started for one command, on one host or on many.

A command that was started once is alone: everything here gives back what it is given, and torch.distributed is not
imported. Objects and small tensors go through Gloo, gradients of a GPU through NCCL.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from tl_trainer.errors import InputError, RunError, TrainerError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

Value = TypeVar("Value")

ANSWER = 300.0  # seconds in which all ranks have to be there
LONGEST = datetime.timedelta(days=1)  # that a rank may wait for another one, such as for the head to be found
ORPHANED = 5.0  # seconds that a rank has for its end after the end of torchrun
# What Gloo and NCCL say of a rank that has ended.
LOST = ("losed by peer", "reset by peer", "roken pipe", "remote process exited")
PIECES = 8  # per rank, into which work is cut, so that a slow rank does not hold up the others


@dataclass
class _Group:
    """store: of this start of the ranks; lasting: of torchrun, which may start them again. handouts: so far."""

    rank: int
    world: int
    local: int
    name: str
    store: Store
    lasting: Store
    handouts: int = 0


_group: _Group | None = None


def asked_for() -> bool:
    """Whether this process was started as one of several. InputError where WORLD_SIZE is no number."""
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal():
        raise InputError(f"WORLD_SIZE is {given!r}, not a number of processes; start it with torchrun, or unset it")
    return int(given) > 1


def join() -> None:
    """Meet the other ranks, if there are any; to be called once, before anything that could fail on one of them.

    Raises InputError, with the remedy, where they are not there in time.
    """
    global _group
    if not asked_for():
        return
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise InputError(
            f"started as one of {os.environ['WORLD_SIZE']} processes (WORLD_SIZE), and {missing[0]} is not set; start "
            "it with torchrun, or once without WORLD_SIZE"
        )
    parent = os.getppid()
    import torch
    from torch import distributed as dist
    from torch.distributed import distributed_c10d as c10d
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    patience = datetime.timedelta(seconds=ANSWER)
    try:
        lasting, _, _ = next(iter(rendezvous("env://", timeout=patience)))
        store = PrefixStore(_round(lasting, rank, world), lasting)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
    except (RuntimeError, TimeoutError, OSError) as error:  # as Gloo raises where it cannot connect
        raise InputError(
            f"rank {rank} on {socket.gethostname()} found no other rank at {place} within {ANSWER:.0f} s: "
            f"{str(error).splitlines()[0]}; are that port and those of Gloo, on GLOO_SOCKET_IFNAME, open between hosts?"
        ) from error
    getattr(c10d, "set_timeout", c10d._set_pg_timeout)(LONGEST)  # the first has taken the place of the second
    name = f"rank {rank} on {socket.gethostname()}"
    _group = _Group(rank, world, int(os.environ["LOCAL_RANK"]), name, store, lasting)
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _round(store: Store, rank: int, world: int) -> str:
    """What the keys of this start begin with: torchrun's store still has those of the start before.

    Rank 0 draws it, and answers the word that each rank has just drawn, so that none takes the answer to an earlier.
    """
    deadline = time.monotonic() + ANSWER
    if rank:
        word = os.urandom(16).hex()
        store.set(f"hello/{rank}", word)
        answer = store.get(f"answer/{word}").decode()
        store.set(f"heard/{answer}/{rank}", "")
        return answer
    drawn, silent = os.urandom(16).hex(), [*range(1, world)]
    while silent:
        for other in silent:
            if store.check([f"hello/{other}"]):
                store.set(f"answer/{store.get(f'hello/{other}').decode()}", drawn)
        silent = [other for other in silent if not store.check([f"heard/{drawn}/{other}"])]
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank {silent[0]} did not answer")
        time.sleep(0.02)
    return drawn


def _end_with_parent(parent: int) -> None:
    """End soon after torchrun, which may be killed: as after SIGTERM, and at last at once."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(ORPHANED)
    os._exit(1)


def leave() -> None:
    """Part from the other ranks."""
    global _group
    if _group is not None:
        from torch import distributed as dist

        _group = None
        dist.destroy_process_group()


def world() -> int:
    """How many ranks there are."""
    return 1 if _group is None else _group.world


def rank() -> int:
    """Which of them this process is."""
    return 0 if _group is None else _group.rank


def name() -> str:
    """This rank and its host, in words."""
    return "this process" if _group is None else _group.name


def is_first() -> bool:
    """Whether this is rank 0, which alone writes what is not a feature, and speaks."""
    return rank() == 0


def local_rank() -> int:
    """Which of the ranks on its host this process is; of these, rank r has GPU r."""
    return 0 if _group is None else _group.local


def local_world() -> int:
    """How many ranks there are on this host, as torchrun says."""
    return 1 if _group is None else int(os.environ.get("LOCAL_WORLD_SIZE") or 1)


def require_alone(what: str) -> None:
    """Raise InputError where there are other ranks."""
    if world() > 1:
        raise InputError(f"{what} is the work of one process; start it without torchrun")


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block this rank works as if there were no other."""
    global _group
    group, _group = _group, None
    try:
        yield
    finally:
        _group = group


def gathered(value: Value) -> list[Value]:
    """What each rank gives, by rank, on all of them. Tensors have to be on the processor."""
    if _group is None:
        return [value]
    from torch import distributed as dist

    values: list[Any] = [None] * _group.world
    dist.all_gather_object(values, value)
    return values


def from_rank(source: int, make: Callable[[], Value]) -> Value:
    """What `make` gives on that rank, which makes it alone, on all of them; an error of it is raised on all."""
    if _group is None:
        return make()
    from torch import distributed as dist

    given: list[Any] = [None]
    if _group.rank == source:
        with _packed(given), alone():
            given[0] = make()
    dist.broadcast_object_list(given, source)
    return _unpacked(given[0])  # type: ignore[no-any-return]


def from_first(make: Callable[[], Value]) -> Value:
    """`from_rank` of rank 0."""
    return from_rank(0, make)


def together(work: Callable[[], Value]) -> list[Value]:
    """What `work` gives on each rank, by rank, on all of them; an error of one is raised on all."""
    if _group is None:
        return [work()]
    given: list[Any] = [None]
    with _packed(given):
        given[0] = work()
    return [_unpacked(value) for value in gathered(given[0])]


def host_by_host(work: Callable[[], Value]) -> Value:
    """What `work` gives, done by the first rank of each host before its others, who find there what it has made."""
    made: list[Value] = []
    for turn in (True, False):
        together(lambda turn=turn: made.append(work()) if (local_rank() == 0) == turn else None)  # type: ignore[misc]
        if _group is None:
            break
    return made[0]


def handed_out(count: int) -> Iterator[int]:
    """The numbers of the pieces of work that this rank gets of `count`: the next one whenever it asks."""
    if _group is None:
        yield from range(count)
        return
    _group.handouts += 1
    key, store = f"work/{_group.handouts}", _group.store
    while (number := store.add(key, 1) - 1) < count:
        yield number


def piece(count: int, most: int, multiple: int = 1) -> int:
    """How large a piece of `count` items is: `most` for a process that is alone, else small enough for all ranks to
    get some, and `multiple` times a number."""
    if _group is None:
        return most
    return multiple * max(1, -(-min(most, count // (PIECES * _group.world)) // multiple))


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks, in its place."""
    if _group is not None:
        from torch import distributed as dist

        dist.all_reduce(value)
    return value


def largest(value: int) -> int:
    """The largest of the numbers that the ranks give."""
    if _group is None:
        return value
    import torch
    from torch import distributed as dist

    number = torch.tensor(value)
    dist.all_reduce(number, dist.ReduceOp.MAX)
    return int(number)


def keep(key: str, value: str) -> None:
    """Keep a text for ranks that torchrun may start in place of these."""
    if _group is not None:
        _group.lasting.set(key, value)


def kept(key: str) -> str | None:
    """What was kept under the key before these ranks started, or since; None where nothing was."""
    return _group.lasting.get(key).decode() if _group is not None and _group.lasting.check([key]) else None


@contextlib.contextmanager
def _packed(given: list[Any]) -> Iterator[None]:
    """Within the block an error is put into `given` instead of being raised, with the rank it is of."""
    assert _group is not None
    name = _group.name
    try:
        yield
    except Exception as error:
        told = error if isinstance(error, TrainerError) else RunError(f"unexpected {type(error).__name__}: {error}")
        told.__dict__.setdefault("origin", name)
        given[0] = _Failure(type(told), told.args, told.__dict__)


@dataclass(frozen=True)
class _Failure:
    """An error on its way to other ranks: one cannot be made anew from its arguments where it adds words to them."""

    kind: type[TrainerError]
    args: tuple[Any, ...]
    attributes: dict[str, Any]


def _unpacked(given: Any) -> Any:
    """What was given; raises it where it is an error."""
    if isinstance(given, _Failure):
        error = given.kind.__new__(given.kind)
        error.args = given.args
        error.__dict__.update(given.attributes)
        raise error
    return given


def teller(error: BaseException) -> str | None:
    """What a message about the error begins with: the rank it is of. None where another rank tells of it, or of the
    error that this one came from."""
    if _group is None:
        return ""
    try:
        tells = _group.store.add("told", 1) == 1
    except Exception:  # torchrun is gone, and its store with it; torch raises anything
        tells = _group.rank == 0
    if not tells:
        return None
    return f"{getattr(error, 'origin', _group.name)}: "


def lost(error: BaseException) -> bool:
    """Whether the error is torch's word for another rank that has ended."""
    return (
        _group is not None
        and type(error).__name__ in ("RuntimeError", "DistBackendError", "DistNetworkError")
        and any(words in str(error) for words in LOST)
    )
