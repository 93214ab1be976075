"""Splits -> batches: order, seeding, workers.

All randomness belongs to (seed, epoch, image): the order of an epoch and each image's augmentation are the same with
any number of workers, and an epoch can be entered at any batch.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tl_trainer.data.dataset import Split
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import DataError, RunError, TrainerError
from tl_trainer.ground.failures import NO_SHARED_MEMORY, WORKER_KILLED, worker_death
from tl_trainer.ground.machine import cores

Item = TypeVar("Item")
_PRIME = 1_000_003


class Batch(NamedTuple):
    """inputs (N, ...), targets (N, ...) as the task has them, indices (N,) into the split."""

    inputs: Tensor
    targets: Tensor
    indices: Tensor


class ImageBatches:
    """Batches of images in a seeded order per epoch (`shuffle`), or in the split's own.

    Iterating over `epoch(e)` gives every image once, the last batch being smaller where it must.
    """

    def __init__(
        self, split: Split, pipeline: Pipeline, *, batch_size: int, workers: int, seed: int = 0, shuffle: bool = False
    ) -> None:
        self.split = split
        self.pipeline = pipeline
        self.batch_size = batch_size
        self.workers = workers
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.split) // self.batch_size)

    def epoch(self, epoch: int, device: torch.device, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, on `device` and ready for the network."""
        chunks = batch_order(len(self.split), self.batch_size, self.seed, epoch, self.shuffle)[start:]
        loader = DataLoader(
            _Batches(self.split, self.pipeline, self.seed, epoch),
            sampler=chunks,
            batch_size=None,  # each item of the sampler is a batch already
            num_workers=min(self.workers, len(chunks)),
            pin_memory=device.type == "cuda",
            worker_init_fn=_set_signals,
            generator=torch.Generator(),  # without one, each epoch would draw from the generator that dropout uses
        )
        for batch in _named_deaths(loader):
            if isinstance(batch, TrainerError):
                raise batch
            inputs = self.pipeline.batch(batch.inputs.to(device, non_blocking=True))
            yield Batch(inputs, batch.targets.to(device, non_blocking=True), batch.indices)


def batch_order(count: int, batch_size: int, seed: int, epoch: int, shuffle: bool) -> list[list[int]]:
    """The indices of each batch of an epoch: a permutation that depends on seed and epoch only."""
    if shuffle:
        generator = torch.Generator().manual_seed((seed * _PRIME + epoch) % 2**63)
        order = torch.randperm(count, generator=generator).tolist()
    else:
        order = list(range(count))
    return [order[first : first + batch_size] for first in range(0, count, batch_size)]


def worker_count(setting: int | str) -> int:
    """`auto` is a process per core up to 8, or none on a machine with a single core."""
    if isinstance(setting, int):
        return setting
    return min(cores(), 8) if cores() > 1 else 0


class _Batches(Dataset[Batch | TrainerError]):
    """The batches of an epoch, by the indices of their images."""

    def __init__(self, split: Split, pipeline: Pipeline, seed: int, epoch: int) -> None:
        self.split, self.pipeline, self.seed, self.epoch = split, pipeline, seed, epoch

    def __getitem__(self, indices: list[int]) -> Batch | TrainerError:
        """The batch; an error is returned, for one that a worker raises reaches `epoch` as the text of a traceback."""
        try:
            inputs = stacked([self._image(index) for index in indices])
        except TrainerError as error:
            return error
        batch = Batch(inputs, torch.tensor([self.split.targets[i] for i in indices]), torch.tensor(indices))
        if get_worker_info() is None:
            return batch
        try:  # here, since in the thread that hands batches over a failure would be waited for, without an end
            return Batch(*(tensor.share_memory_() for tensor in batch))  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            if os.strerror(errno.ENOSPC) not in str(error):
                raise
            return RunError(NO_SHARED_MEMORY)

    def _image(self, index: int) -> Tensor:
        return self.pipeline.draw(self.split.open(index), (self.seed * _PRIME + self.epoch) * _PRIME + index)


def _set_signals(_: int) -> None:
    """A Ctrl-C reaches the workers too; the main process decides what it means. SIGTERM ends a worker at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def stacked(pictures: list[Tensor]) -> Tensor:
    """Images (3, H, W) -> (N, 3, H, W); DataError, with the remedy, where their sizes differ."""
    shapes = sorted({tuple(picture.shape) for picture in pictures})
    if len(shapes) > 1:
        raise DataError(
            f"the transforms give images of different sizes ({shapes[0]} and {shapes[-1]}); "
            "end them with a crop or a Resize to [height, width], e.g. {CenterCrop: 224}"
        )
    return torch.stack(pictures)
