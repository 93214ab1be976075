"""Splits -> batches: order, seeding, workers.

All randomness belongs to (seed, epoch, image): the order of an epoch and each image's augmentation are the same with
any number of workers, and an epoch can be entered at any batch.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tl_trainer.data.dataset import Split
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import DataError, RunError, TrainerError
from tl_trainer.ground.digests import Numbers
from tl_trainer.ground.failures import NO_SHARED_MEMORY, WORKER_KILLED, worker_death
from tl_trainer.ground.machine import cores

Item = TypeVar("Item")
Place = tuple[int, Numbers]  # of a batch: the epoch, the rows of its images (`epoch_rows`)
_PRIME = 1_000_003

# How workers start; None is the system's own way. On Linux they are forked, for they only decode and leave CUDA alone.
# forkserver, Python's default from 3.14 on, imports torch anew in each, and with it the user's script, which then needs
# an `if __name__ == "__main__"`.
START_METHOD = "fork" if sys.platform == "linux" else None


class Batch(NamedTuple):
    """inputs (N, ...), targets (N, ...) as the task has them, indices (N,) into the split.

    whole: where ranks divide the batch, the indices of all of it; empty where this is all. share: how much of it is
    here; 0 where that is one image as a stand-in, since the batch has fewer images than there are ranks.
    """

    inputs: Tensor
    targets: Tensor
    indices: Tensor
    whole: Sequence[int] = ()
    share: float = 1.0

    @property
    def images(self) -> int:
        """How many the whole batch has."""
        return len(self.whole) or len(self.indices)


class Part(NamedTuple):
    """What a rank takes of a batch that all of them divide."""

    rank: int = 0
    world: int = 1

    def of(self, rows: Numbers) -> Numbers:
        """The rows of this rank; the first of all where there are too few for it."""
        own = rows[len(rows) * self.rank // self.world : len(rows) * (self.rank + 1) // self.world]
        return own if len(own) else rows[:1]

    def marked(self, batch: Batch, rows: Numbers, count: int) -> Batch:
        """The batch of the rows `of` these, with what it is a part of; count: of the images in the split."""
        if self.world == 1:
            return batch
        own = len(rows) * (self.rank + 1) // self.world - len(rows) * self.rank // self.world
        return batch._replace(whole=(rows % count).tolist(), share=own / len(rows))


WHOLE = Part()


@dataclass(eq=False)
class ImageBatches:
    """Batches of images in a seeded order per epoch (`shuffle`), or in the split's own.

    Iterating over `epoch(e)` gives every image once, or every class equally often (`balanced`), the last batch being
    smaller where it must, but not smaller than `smallest`; of each this is `part`. The same workers read all epochs,
    one at a time, until `close` or until one is left in the middle.
    """

    split: Split
    pipeline: Pipeline
    batch_size: int
    workers: int
    seed: int = 0
    shuffle: bool = False
    smallest: int = 1
    balanced: bool = False
    part: Part = WHOLE
    _places: list[Place] = field(default_factory=list, init=False)  # of the epoch under way
    _loader: DataLoader[Batch | TrainerError] | None = field(default=None, init=False)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(batch_starts(epoch_size(self.split.targets, self.balanced), self.batch_size, self.smallest))

    def epoch(self, epoch: int, device: torch.device, start: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every `step`-th batch of an epoch from number `start` on, on `device` and ready for the network."""
        rows = epoch_rows(self.split.targets, self.seed, epoch, self.balanced)
        order = batch_order(rows, self.batch_size, self.seed, epoch, self.shuffle, self.smallest)
        order = order[start::step]
        self._places[:] = [(epoch, self.part.of(rows)) for rows in order]
        if self._loader is None:
            self._loader = self._new_loader(device)
        pinned = device.type == "cuda"  # elsewhere a copy that does not wait may read memory that is used anew
        try:
            for rows, batch in zip(order, _named_deaths(self._loader), strict=True):
                if isinstance(batch, TrainerError):
                    raise batch
                inputs, targets = (part.to(device, non_blocking=pinned) for part in (batch.inputs, batch.targets))
                batch = Batch(self.pipeline.batch(inputs), targets, batch.indices)
                yield self.part.marked(batch, rows, len(self.split))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers."""
        loader, self._loader = self._loader, None
        if loader is not None and loader._iterator is not None:
            loader._iterator._shutdown_workers()  # type: ignore[attr-defined]

    def _new_loader(self, device: torch.device) -> DataLoader[Batch | TrainerError]:
        workers = min(self.workers, len(self))
        return DataLoader(
            _Batches(self.split, self.pipeline, self.seed),
            sampler=self._places,
            batch_size=None,  # each item of the sampler is a batch already
            num_workers=workers,
            persistent_workers=workers > 0,
            multiprocessing_context=START_METHOD if workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=prepare_worker,
            generator=torch.Generator(),  # without one, it would draw from the generator that dropout uses
        )


def batch_starts(count: int, batch_size: int, smallest: int = 1) -> list[int]:
    """Where each batch of an epoch begins; a last one of fewer than `smallest` images joins the one before it."""
    starts = list(range(0, count, batch_size))
    return starts[:-1] if len(starts) > 1 and count - starts[-1] < smallest else starts


def epoch_size(targets: Sequence[int], balanced: bool) -> int:
    """The images of an epoch: all, or of each class as many as of the mean one, rounded up."""
    if not balanced:
        return len(targets)
    classes = len({*targets})
    return -(-len(targets) // classes) * classes


def epoch_rows(targets: Sequence[int], seed: int, epoch: int, balanced: bool) -> Numbers:
    """The images of an epoch: each once, or every class equally often, by seed and epoch only.

    Of one class no image comes more than once more than another; the image at index i is i + k * len(targets) when it
    comes for the (k + 1)th time.
    """
    count = len(targets)
    if not balanced:
        return np.arange(count)
    of_class: dict[int, list[int]] = {}
    for index, target in enumerate(targets):
        of_class.setdefault(target, []).append(index)
    generator = torch.Generator().manual_seed(~seed_of(seed, epoch, 0) % 2**63)
    rows: list[int] = []
    for members in of_class.values():
        times, rest = divmod(epoch_size(targets, True) // len(of_class), len(members))
        drawn = torch.randperm(len(members), generator=generator)[:rest].tolist()
        rows += [index + count * time for time in range(times) for index in members]
        rows += [members[place] + count * times for place in drawn]
    return np.array(rows, np.int64)


def batch_order(
    rows: Numbers, batch_size: int, seed: int, epoch: int, shuffle: bool, smallest: int = 1
) -> list[Numbers]:
    """The rows of each batch of an epoch: a permutation that depends on seed and epoch only."""
    if shuffle:
        generator = torch.Generator().manual_seed((seed * _PRIME + epoch) % 2**63)
        rows = rows[torch.randperm(len(rows), generator=generator).numpy()]
    starts = batch_starts(len(rows), batch_size, smallest)
    return np.split(rows, starts[1:]) if starts else []


def seed_of(seed: int, epoch: int, row: int) -> int:
    """What an image draws from in an epoch; row: as of `epoch_rows`."""
    return (seed * _PRIME + epoch) * _PRIME + row


def worker_count(setting: int | str) -> int:
    """`auto` is a process per core up to 8, or none on a machine with a single core."""
    if isinstance(setting, int):
        return setting
    return min(cores(), 8) if cores() > 1 else 0


class _Batches(Dataset[Batch | TrainerError]):
    """The batches of all epochs, by their places."""

    def __init__(self, split: Split, pipeline: Pipeline, seed: int) -> None:
        self.split, self.pipeline, self.seed = split, pipeline, seed

    def __getitem__(self, place: Place) -> Batch | TrainerError:
        """The batch; an error is returned, for one that a worker raises reaches `epoch` as the text of a traceback."""
        epoch, rows = place[0], place[1].tolist()
        indices = [row % len(self.split) for row in rows]
        try:
            inputs = stacked([self._image(epoch, row) for row in rows])
        except TrainerError as error:
            return error
        batch = Batch(inputs, torch.tensor([self.split.targets[i] for i in indices]), torch.tensor(indices))
        if get_worker_info() is None:
            return batch
        try:  # here, since in the thread that hands batches over a failure would be waited for, without an end
            return Batch(*(tensor.share_memory_() for tensor in batch[:3]))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            return RunError(NO_SHARED_MEMORY)

    def _image(self, epoch: int, row: int) -> Tensor:
        return self.pipeline.draw(self.split.open(row % len(self.split)), seed_of(self.seed, epoch, row))


def prepare_worker(_: int = 0) -> None:
    """What a process that loads images does first: it leaves Ctrl-C to the main process, and ends with that.

    A Ctrl-C reaches the workers too; the main process decides what it means. SIGTERM ends a worker at once.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """torch watches the parent instead: only between batches, and a forkserver lives as long as its workers do."""
    main_process = multiprocessing.parent_process()
    assert main_process is not None
    main_process.join()
    os._exit(1)


def _named_deaths(batches: Iterable[Item]) -> Iterator[Item]:
    """The batches; RunError, with the remedy, where a worker dies."""
    try:
        yield from batches
    except (RuntimeError, OSError, EOFError) as error:
        if message := worker_death(error) or _cut_off(error):
            in_main = threading.current_thread() is threading.main_thread()
            if in_main and hasattr(signal, "SIGCHLD"):  # else torch reports it again while it ends the other workers
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise RunError(message) from error
        raise


def _cut_off(error: Exception) -> str | None:
    """What is to be said where a worker died while it handed over a batch."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return NO_SHARED_MEMORY if error.errno == errno.ENOSPC else None
    return None if isinstance(error, RuntimeError) else WORKER_KILLED


def chunked(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`, the last one of what is left."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def stacked(pictures: list[Tensor]) -> Tensor:
    """Images (3, H, W) -> (N, 3, H, W); DataError, with the remedy, where their sizes differ."""
    shapes = sorted({tuple(picture.shape) for picture in pictures})
    if len(shapes) > 1:
        raise DataError(
            f"the transforms give images of different sizes ({shapes[0]} and {shapes[-1]}); "
            "end them with a crop or a Resize to [height, width], e.g. {CenterCrop: 224}"
        )
    return torch.stack(pictures)
