"""The feature cache: what the frozen prefix makes of an image is computed once and kept.

A row's key is the hash of the image's content and the view; the store it lies in is named by the hash of everything
else that decides its value: preprocessing, backbone, frozen weights, stages, precision and device.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_trainer.config.data import expand
from tl_trainer.config.schema import FeaturesSection
from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import (
    WHOLE,
    Batch,
    Part,
    batch_order,
    batch_starts,
    chunked,
    epoch_rows,
    epoch_size,
    stacked,
)
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import InputError, RunError
from tl_trainer.exchange import exchange
from tl_trainer.feature_folders import make_room
from tl_trainer.feature_store import FORBIDDEN, FeatureStore
from tl_trainer.ground import distributed
from tl_trainer.ground.digests import Digests, Numbers
from tl_trainer.ground.files import cache_folder, make_folder
from tl_trainer.ground.machine import free_memory
from tl_trainer.ground.progress import bar
from tl_trainer.models.prefix import FrozenPrefix
from tl_trainer.views import Missing, drawn, reading

log = logging.getLogger(__name__)

# Small enough for the activations to stay in a processor's caches, large enough for a GPU to be busy.
IMAGES_AT_ONCE = {"cpu": 16, "cuda": 128}
# Rows that are read before they are computed, where the cores take turns: enough for all to end at about the same time.
READ_AT_ONCE = 256
IMAGES_READ_AT_ONCE = 16  # however many views there are of each
EVALUATED_AT_ONCE = 1024


class NoRoom(InputError):
    """The features are more than `features.limit_gb`. `fact` is the message without its remedy."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}; raise it, tap a later stage, or set features.cache: off")
        self.fact = fact


@dataclass
class Extractor:
    """Computes and keeps the features of verified splits. `make_prefix` gives the network that computes them.

    identity: what decides a feature's value besides the image, as plain data. workers: processes that draw random
    views, 0 for none. computed: rows computed so far.
    """

    make_prefix: Callable[[], FrozenPrefix]
    identity: dict[str, Any]
    folder: Path
    limit: int
    device: torch.device
    workers: int = 0
    computed: int = field(default=0, init=False)
    _at_once: int = field(default=0, init=False)  # images, where the device has too little memory for a whole batch
    _told: bool = field(default=False, init=False)
    _planned: int = field(default=0, init=False)
    _kept: set[Path] = field(default_factory=set, init=False)

    def plan(self, rows: int, pipelines: Iterable[Pipeline]) -> None:
        """Tell, before its first split, what a run keeps: so many rows, in the stores of these pipelines.

        All of them must fit into the limit together, and none of these stores makes room for another.
        """
        self._planned, self._kept = rows, {self._folder(pipeline) for pipeline in pipelines}

    def make_folder(self) -> None:
        """Create the cache's folder. Raises InputError where that cannot work; another user's may be read-only."""
        try:
            make_folder(self.folder, "features.dir")
        except InputError as error:
            cause = error.__cause__
            if not (self.folder.is_dir() and isinstance(cause, OSError) and cause.errno in FORBIDDEN):
                raise

    def features(self, split: Split, what: str, pipeline: Pipeline, views: int = 1, seed: int = 0) -> Features:
        """The features of every image of the split, from the cache where they are there.

        what: what messages call the split; nothing is said where it is empty. With random transforms, `views` of each
        image are drawn, each from (seed, view, image). Raises ImageError for an image that changed meanwhile, NoRoom.
        """
        tags = [f"{seed} {view}".encode() if not pipeline.deterministic else b"" for view in range(views)]
        self.make_folder()
        store = self._store(pipeline)
        keys = [_keys(split.hashes, tag) for tag in dict.fromkeys(tags)]  # of one view, where none is random
        # What rank 0 lacks is computed by all; afterwards each is sent what is not in its own cache.
        missing = Missing(keys, distributed.from_first(lambda: [store.lacking(of_view) for of_view in keys]))

        def compute() -> int:
            before = self.computed
            if len(missing):
                self._compute(split, what, pipeline, store, missing)
            return self.computed - before

        level, computed = logging.INFO if what else logging.DEBUG, sum(distributed.together(compute))
        if distributed.world() > 1:
            for of_view in keys:
                exchange(store, of_view)
        log.log(level, "features of %s: %d computed, %d cached", what, computed, len(keys) * split.different - computed)
        rows = [store.rows(of_view) for of_view in keys]
        return Features(store, rows * (views // len(rows)), split)

    def _folder(self, pipeline: Pipeline) -> Path:
        identity = json.dumps({**self.identity, "preprocessing": pipeline.steps}, sort_keys=True)
        return self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32]

    def _store(self, pipeline: Pipeline) -> FeatureStore:
        store = FeatureStore(self._folder(pipeline))
        with contextlib.suppress(OSError):  # another user's
            os.utime(store.folder)  # when it was used last, for make_room
        return store

    def _compute(self, split: Split, what: str, pipeline: Pipeline, store: FeatureStore, missing: Missing) -> None:
        """Compute the missing rows and append them to the store."""
        count = missing.rows
        prefix, roomy = self.make_prefix(), False
        size, overlap = IMAGES_AT_ONCE.get(self.device.type, 16), self.device.type != "cpu"
        block = max(IMAGES_READ_AT_ONCE, (size if overlap else READ_AT_ONCE) * len(missing) // count)
        block = distributed.piece(len(missing), block, size)  # so that batches are those of a process that is alone
        pieces = distributed.handed_out(-(-len(missing) // block))
        blocks = (missing.block(number * block, (number + 1) * block) for number in pieces)
        workers = self.workers if len(missing) > block else 0  # else starting them takes longer than they save
        with contextlib.closing(store), self._saying_what_is_kept(), reading(split, pipeline, workers) as read:
            chunks = chunked(drawn(blocks, read, overlap=overlap), size)
            for chunk in bar(chunks, f"{what} features", -(-count // (size * distributed.world()))):
                rows = self._rows(prefix, pipeline, stacked([image for _, image in chunk]))
                if not roomy:
                    self._check_room(store, rows, count)
                    roomy = True
                store.append([key for key, _ in chunk], rows)
                self.computed += len(chunk)
            if store.in_memory and not self._told:
                log.warning(
                    "%s is another user's or read-only: new features are kept in memory, and computed again in another "
                    "run; to keep them, set features.dir",
                    store.folder,
                )
                self._told = True

    def _rows(self, prefix: FrozenPrefix, pipeline: Pipeline, images: Tensor) -> Tensor:
        """The rows of the images, as many images at once as the device has memory for."""
        pinned = self.device.type == "cuda"
        while True:
            try:
                moved = (
                    (part.pin_memory() if pinned else part).to(self.device, non_blocking=pinned)
                    for part in torch.split(images, self._at_once or len(images))
                )
                return torch.cat([prefix(pipeline.batch(part)).cpu() for part in moved])
            except torch.OutOfMemoryError as error:
                size = self._at_once or len(images)
                if size == 1:
                    raise RunError(
                        "the GPU is out of memory with a single image; end other programs on it or use --device cpu"
                    ) from error
            if not self._at_once:
                log.warning("the GPU has too little memory for %d images at once; going on with fewer", size)
            self._at_once = size // 2

    @contextlib.contextmanager
    def _saying_what_is_kept(self) -> Iterator[None]:
        before = self.computed
        try:
            yield
        except KeyboardInterrupt:
            kept = self.computed - before
            log.warning("%d features were computed and are kept: the same command computes only the others", kept)
            raise

    def _check_room(self, store: FeatureStore, rows: Tensor, count: int) -> None:
        size, planned = rows[0].numel() * rows.element_size(), max(count, self._planned)
        if planned * size > self.limit:
            raise NoRoom(
                f"the features of {planned:,} images, each view counted, take {planned * size / 1e9:.3g} GB, more than "
                f"features.limit_gb ({self.limit / 1e9:g})"
            )
        self._planned = 0  # only the first split checks the plan: rows of another may have another size
        make_room(self.folder, count * size, self.limit, keep={store.folder, *self._kept})


class Features:
    """The features of a split's images that could be read (`split`): in memory where they fit, else memory-mapped.

    rows: of each view, where the images' features are in the store.
    """

    def __init__(self, store: FeatureStore, rows: list[Numbers], split: Split) -> None:
        self.store: FeatureStore | None = store
        self.rows, self.views = rows, len(rows)
        self.split = split
        self.targets = torch.tensor(list(split.targets))
        self.device = self.targets.device
        size = self.views * len(split) * store.row_bytes
        self.tables = [store.take(of_view) for of_view in rows] if size < free_memory() / 2 else None
        if self.tables is not None:
            self.store, self.rows = None, []  # and with it the memory-mapped copy

    def move(self, device: torch.device) -> None:
        """Bring all that is in memory to a GPU, once, where it takes less than half of what is free there."""
        if self.tables is None or self.device == device:
            return
        if sum(table.nbytes for table in self.tables) < free_on(device) / 2:
            self.tables, self.targets = [table.to(device) for table in self.tables], self.targets.to(device)
            self.device = device

    def take(self, view: int, indices: Sequence[int] | Tensor) -> Tensor:
        """The features of one view of the images at `indices`, (N, ...) in the precision they were computed in."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        if self.tables is not None:
            return self.tables[view][rows]
        assert self.store is not None
        return self.store.take(self.rows[view][rows.cpu().numpy()])


@dataclass(eq=False)
class FeatureBatches:
    """Batches of cached features in the same order in which the images would come; epoch e uses view e mod K.

    The order is that of `ImageBatches` of the same settings.
    """

    features: Features
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    smallest: int = 1
    balanced: bool = False
    part: Part = WHOLE

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(batch_starts(epoch_size(self._targets, self.balanced), self.batch_size, self.smallest))

    def in_order(self) -> FeatureBatches:
        """The same features, each image once and in the split's order."""
        return FeatureBatches(self.features, batch_size=self.batch_size)

    def epoch(self, epoch: int, device: torch.device, start: int = 0, step: int = 1) -> Iterator[Batch]:
        """Every `step`-th batch of an epoch from number `start` on, float32, on `device`."""
        features, view = self.features, epoch % self.features.views
        features.move(device)
        chosen = epoch_rows(self._targets, self.seed, epoch, self.balanced)
        order = batch_order(chosen, self.batch_size, self.seed, epoch, self.shuffle, self.smallest)[start::step]
        # All at once, for each copy to a GPU waits until that has nothing left to do.
        own = [self.part.of(rows) for rows in order]
        rows = torch.from_numpy(np.concatenate([chosen[:0], *own])) % len(self._targets)
        sizes = [len(indices) for indices in own]
        parts = (torch.split(part, sizes) for part in (rows, rows.to(features.device)))
        for whole, indices, placed in zip(order, *parts, strict=True):
            inputs, targets = features.take(view, placed).to(device), features.targets[placed].to(device)
            yield self.part.marked(Batch(inputs.float(), targets, indices), whole, len(self._targets))

    @property
    def _targets(self) -> Sequence[int]:
        return self.features.split.targets

    def close(self) -> None:
        """There is nothing to end."""


def features_folder(section: FeaturesSection) -> Path:
    """Where features are kept: `features.dir`, else a folder in the user's cache."""
    return expand(section.dir) if section.dir else cache_folder() / "features"


def free_on(device: torch.device) -> int:
    """The bytes that are free on a GPU; 0 for another kind of device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0


def views_that_fit(features: Features, row: int, kept: int, device: torch.device) -> int:
    """How many views fit into half of the memory that is free on the device, with the copies that a solver makes.

    row, kept: the numbers that are kept beside these of each row, and in all.
    """
    free = free_on(device) if device.type == "cuda" else free_memory()
    view = 4 * len(features.targets) * (4 * features.take(0, [0]).numel() + row)
    return min(features.views, max(0, int((free / 2 - 4 * kept) // view)))


def _keys(hashes: Sequence[bytes], tag: bytes) -> Digests:
    return Digests.of(hashlib.sha256(digest + tag).digest() for digest in hashes) if tag else Digests.of(hashes)
