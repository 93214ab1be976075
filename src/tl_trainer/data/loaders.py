"""Splits -> batches: order, seeding, workers.

All randomness belongs to (seed, epoch, image): the order of an epoch and each image's augmentation are the same with
any number of workers, and an epoch can be entered at any batch.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from tqdm import tqdm

from tl_trainer.data import images
from tl_trainer.data.dataset import Split
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import DataError, ImageError, RunError, TrainerError

log = logging.getLogger(__name__)

Item = TypeVar("Item")
_PRIME = 1_000_003
NO_SHARED_MEMORY = (
    "the shared memory (/dev/shm) is too small for the processes that load images; load in the main process with "
    "--workers 0, or give a container more with --shm-size"
)


class Batch(NamedTuple):
    """inputs (N, ...), targets (N,) of class indices, indices (N,) into the split."""

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


def cores() -> int:
    """The processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def worker_count(setting: int | str) -> int:
    """`auto` is a process per core up to 8, or none on a machine with a single core."""
    if isinstance(setting, int):
        return setting
    return min(cores(), 8) if cores() > 1 else 0


def readable(split: Split, what: str, on_bad_image: str) -> Split:
    """The split without images that cannot be read: they raise DataError (`error`) or are counted and named (`skip`).

    Every file is read and decoded once, at the eighth of the size for JPEG, before the first epoch: a truncated image
    must not end a run at its last hour.
    """
    if split.paths is None or split.digests:  # read before: `Split.open` sees to it that they are still the same
        return split
    with ThreadPoolExecutor(cores()) as pool:  # Pillow releases the GIL while it decodes
        checks = pool.map(lambda index: _checked(split, index), range(len(split)))
        bar = tqdm(checks, f"checking {what} images", len(split), unit="img", leave=False, disable=None)
        found = list(bar)
    bad = {index: str(item) for index, item in enumerate(found) if isinstance(item, ImageError)}
    return without_bad(known(split, found), bad, what, on_bad_image)


def known(split: Split, hashes: Sequence[bytes | ImageError]) -> Split:
    """The split as it was read, with the content hash of every image that could be."""
    return replace(split, digests=[item if isinstance(item, bytes) else b"" for item in hashes])


def without_bad(split: Split, bad: dict[int, str], what: str, on_bad_image: str) -> Split:
    """The split without the images at the indices of `bad`, whose values say what is wrong with each.

    Raises DataError unless they are to be skipped, or where nothing would be left. on_bad_image: `error`, `skip`, or
    `changed` for a split that was read before, of which none may be missing now.
    """
    if not bad:
        return split
    listing = "\n".join(bad[index] for index in sorted(bad)[:2])
    if on_bad_image == "changed":
        raise DataError(listing)
    if on_bad_image == "error":
        raise DataError(
            f"{len(bad)} of {len(split)} {what} images cannot be used; replace or remove them, or set "
            f"data.on_bad_image: skip (tl-eval: --on-bad-image skip)\n{listing}"
        )
    log.warning("skipped %d of %d %s images that cannot be read, e.g.\n%s", len(bad), len(split), what, listing)
    kept = [index for index in range(len(split)) if index not in bad]
    if not kept:
        raise DataError(f"none of the {len(split)} {what} images can be read")
    return split.subset(kept)


def _checked(split: Split, index: int) -> bytes | ImageError:
    """The SHA-256 of an image's file, or why it cannot be used."""
    assert split.paths is not None
    path = split.paths[index]
    try:
        data = images.read(path)
        images.decode(data, path, check_only=True)
    except ImageError as error:
        return error
    return hashlib.sha256(data).digest()


class _Batches(Dataset[Batch | TrainerError]):
    """The batches of an epoch, by the indices of their images."""

    def __init__(self, split: Split, pipeline: Pipeline, seed: int, epoch: int) -> None:
        self.split, self.pipeline, self.seed, self.epoch = split, pipeline, seed, epoch

    def __getitem__(self, indices: list[int]) -> Batch | TrainerError:
        """The batch; an error is returned, since one raised in a worker would reach the user as a traceback."""
        try:
            inputs = stacked([self._image(index) for index in indices])
        except DataError as error:
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
    except (RuntimeError, OSError, EOFError) as error:  # the last two where it dies while it hands over a batch
        if death := named_death(error):
            if hasattr(signal, "SIGCHLD"):  # else torch reports it once more while it ends the other workers
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            raise death from error
        raise


def named_death(error: Exception) -> RunError | None:
    """The remedy where torch only says that a worker died, which it may do at any moment and not only for a batch."""
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        return RunError(NO_SHARED_MEMORY) if error.errno == errno.ENOSPC else None
    if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in text:  # not what one has raised
        return None
    if "shared memory" in text or "Bus error" in text:
        return RunError(NO_SHARED_MEMORY)
    return RunError("a process that loads images was killed, perhaps because memory ran out; try fewer with --workers")


def stacked(pictures: list[Tensor]) -> Tensor:
    """Images (3, H, W) -> (N, 3, H, W); DataError, with the remedy, where their sizes differ."""
    shapes = sorted({tuple(picture.shape) for picture in pictures})
    if len(shapes) > 1:
        raise DataError(
            f"the transforms give images of different sizes ({shapes[0]} and {shapes[-1]}); "
            "end them with a crop or a Resize to [height, width], e.g. {CenterCrop: 224}"
        )
    return torch.stack(pictures)
