"""The images whose features are missing, read and drawn: one view by the eval transforms, or several random ones."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import START_METHOD, prepare_worker
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import RunError
from tl_trainer.ground.digests import Digests, Numbers
from tl_trainer.ground.failures import WORKER_KILLED
from tl_trainer.ground.machine import cores

Views = list[np.ndarray[Any, Any]]  # of one image, each (3, H, W)
Row = tuple[bytes, Tensor]


class Image(NamedTuple):
    """An image, by its place in the split, and the keys of its rows that are to be computed, one for each view."""

    place: int
    keys: list[bytes]


class Missing:
    """The images whose rows are to be computed; as columns, for there may be millions.

    keys: of each view, those of all images of the split. places: of each view, which images lack it.
    """

    def __init__(self, keys: Sequence[Digests], places: Sequence[Numbers]) -> None:
        images, views = np.concatenate(places), np.repeat(np.arange(len(places)), [*map(len, places)])
        order = np.lexsort((views, images))
        self._keys, self._images, self._views = keys, images[order], views[order]
        starts = np.unique(self._images, return_index=True)[1]
        self._starts = np.append(starts, len(images))  # of each image, and the end

    def __len__(self) -> int:
        """How many images there are."""
        return len(self._starts) - 1

    @property
    def rows(self) -> int:
        """How many rows there are, one for each view that an image lacks."""
        return len(self._images)

    def block(self, first: int, end: int) -> list[Image]:
        """The images from one number on, up to another."""
        bounds = pairwise(self._starts[first : end + 1].tolist())
        return [Image(int(self._images[at]), [self._key(row) for row in range(at, to)]) for at, to in bounds]

    def _key(self, row: int) -> bytes:
        of_view: Digests = self._keys[self._views[row]]
        return of_view[int(self._images[row])]


def drawn(blocks: Iterator[Sequence[Image]], read: Callable[[Image], Future[Views]], *, overlap: bool) -> Iterator[Row]:
    """The missing rows, each its key and its image, read in blocks of images.

    overlap: read while what came before is computed. Where the cores do both, taking turns is faster: a thread of
    the network that has to share its core holds up all the others.
    """
    block, ahead = next(blocks, None), list[Future[Views]]()
    while block is not None:
        try:
            views = [future.result() for future in ahead or [read(image) for image in block]]
            following = next(blocks, None)
            ahead = [read(image) for image in following] if overlap and following is not None else []
        except BrokenExecutor as error:
            raise RunError(WORKER_KILLED) from error
        for image, arrays in zip(block, views, strict=True):
            yield from zip(image.keys, map(torch.from_numpy, arrays), strict=True)
        block = following


@contextlib.contextmanager
def reading(split: Split, pipeline: Pipeline, workers: int) -> Iterator[Callable[[Image], Future[Views]]]:
    """What starts to read an image: in threads, or where drawing is random in `workers` processes (0: in one thread).

    torchvision's transforms draw from torch's one generator, and two threads draw no faster than one, for too much of
    the work holds Python's lock.
    """
    pool: Executor
    read: Callable[[Image], Views]
    if pipeline.deterministic or not workers:
        pool, read = ThreadPoolExecutor(cores() if pipeline.deterministic else 1), partial(_views, split, pipeline)
    else:
        context = multiprocessing.get_context(START_METHOD)
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(split, pipeline))
        read = _views_in_worker
    try:
        yield lambda image: pool.submit(read, image)
    finally:
        pool.shutdown(cancel_futures=True)


def _views(split: Split, pipeline: Pipeline, image: Image) -> Views:
    """The missing views of an image, each drawn from its key, as arrays: these reach another process without files."""
    picture = split.open(image.place)
    return [pipeline.draw(picture, int.from_bytes(key[:8], "little")).numpy() for key in image.keys]


def _start_worker(split: Split, pipeline: Pipeline) -> None:
    _worker.append((split, pipeline))
    prepare_worker()
    torch.set_num_threads(1)


_worker: list[tuple[Split, Pipeline]] = []  # of a worker process, set when it starts


def _views_in_worker(image: Image) -> Views:
    return _views(*_worker[0], image)
