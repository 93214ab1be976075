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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tl_trainer.config.schema import FeaturesSection, expand
from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import Batch, batch_order, batch_starts, stacked
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import InputError
from tl_trainer.feature_store import FeatureStore, make_room
from tl_trainer.ground.files import cache_folder, make_folder
from tl_trainer.ground.machine import cores, free_memory
from tl_trainer.ground.progress import bar
from tl_trainer.models.prefix import FrozenPrefix

log = logging.getLogger(__name__)

# Small enough for the activations to stay in a processor's caches, large enough for a GPU to be busy.
IMAGES_AT_ONCE = {"cpu": 16, "cuda": 128}
DECODED_AT_ONCE = 64  # where decoding and computing take turns: enough for all threads to end at about the same time
EVALUATED_AT_ONCE = 1024


class NoRoom(InputError):
    """The features are more than `features.limit_gb`. `fact` is the message without its remedy."""

    def __init__(self, fact: str) -> None:
        super().__init__(f"{fact}; raise it, tap a later stage, or set features.cache: off")
        self.fact = fact


class Missing(NamedTuple):
    """A row to compute: its key, and which image of the split it is of."""

    key: bytes
    image: int


@dataclass
class Extractor:
    """Computes and keeps the features of verified splits. `make_prefix(n)` gives the network that computes n rows.

    identity: what decides a feature's value besides the image, as plain data. computed: rows computed so far.
    """

    make_prefix: Callable[[int], FrozenPrefix]
    identity: dict[str, Any]
    folder: Path
    limit: int
    device: torch.device
    computed: int = field(default=0, init=False)

    def features(self, split: Split, what: str, pipeline: Pipeline, views: int = 1, seed: int = 0) -> Features:
        """The features of every image of the split, from the cache where they are there.

        what: what messages call the split; nothing is said where it is empty. With random transforms, `views` of each
        image are drawn, each from (seed, view, image). Raises ImageError for an image that changed meanwhile, NoRoom.
        """
        tags = [f"{seed} {view}".encode() if not pipeline.deterministic else b"" for view in range(views)]
        make_folder(self.folder, "features.dir")
        store = self._store(pipeline)
        keys = [[_key(digest, tag) for digest in split.hashes] for tag in tags]
        wanted = {key: index for index, views_of_one in enumerate(zip(*keys, strict=True)) for key in views_of_one}
        missing = [Missing(key, wanted[key]) for key in store.find(wanted)]
        if missing:
            self._compute(split, what, pipeline, store, missing)
        level = logging.INFO if what else logging.DEBUG
        log.log(level, "features of %s: %d computed, %d cached", what, len(missing), len(wanted) - len(missing))
        return Features(store, keys, split)

    def _store(self, pipeline: Pipeline) -> FeatureStore:
        identity = json.dumps({**self.identity, "preprocessing": pipeline.steps}, sort_keys=True)
        store = FeatureStore(self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32])
        os.utime(store.folder)  # when it was used last, for make_room
        return store

    def _compute(
        self, split: Split, what: str, pipeline: Pipeline, store: FeatureStore, missing: Sequence[Missing]
    ) -> None:
        """Compute the missing rows and append them to the store."""
        prefix, roomy = self.make_prefix(len(missing)), False
        size = IMAGES_AT_ONCE.get(self.device.type, 16)
        with contextlib.closing(store), ThreadPoolExecutor(cores()) as pool:
            chunks = _decoded(split, pipeline, missing, size, pool, overlap=self.device.type != "cpu")
            for chunk, decoded in bar(chunks, f"{what} features", -(-len(missing) // size)):
                batch, pinned = stacked(decoded), self.device.type == "cuda"
                if pinned:
                    batch = batch.pin_memory()
                rows = prefix(pipeline.batch(batch.to(self.device, non_blocking=pinned)))
                if not roomy:
                    self._check_room(store, rows, len(missing))
                    roomy = True
                store.append([row.key for row in chunk], rows)
                self.computed += len(chunk)

    def _check_room(self, store: FeatureStore, rows: Tensor, count: int) -> None:
        needed = rows[0].numel() * rows.element_size() * count
        if needed > self.limit:
            raise NoRoom(
                f"the features of {count:,} images take {needed / 1e9:.3g} GB, more than features.limit_gb "
                f"({self.limit / 1e9:g})"
            )
        make_room(self.folder, needed, self.limit, keep=store.folder)


class Features:
    """The features of a split's images that could be read (`split`): in memory where they fit, else memory-mapped."""

    def __init__(self, store: FeatureStore, keys: list[list[bytes]], split: Split) -> None:
        self.store: FeatureStore | None = store
        self.keys = keys
        self.split = split
        self.targets = torch.tensor(list(split.targets))
        size = len(keys) * len(split) * store.row_bytes
        self.tables = [store.take(view) for view in keys] if size < free_memory() / 2 else None
        if self.tables is not None:
            self.store = None  # and with it the memory-mapped copy

    def take(self, view: int, indices: Sequence[int]) -> Tensor:
        """The features of one view of the images at `indices`, (N, ...) in the precision they were computed in."""
        if self.tables is not None:
            return self.tables[view][list(indices)]
        assert self.store is not None
        return self.store.take([self.keys[view][index] for index in indices])


class FeatureBatches:
    """Batches of cached features in the same order in which the images would come; epoch e uses view e mod K."""

    def __init__(
        self, features: Features, *, batch_size: int, seed: int = 0, shuffle: bool = False, smallest: int = 1
    ) -> None:
        self.features = features
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.smallest = smallest  # as for `ImageBatches`

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(batch_starts(len(self.features.targets), self.batch_size, self.smallest))

    def epoch(self, epoch: int, device: torch.device, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, float32, on `device`."""
        features, view = self.features, epoch % len(self.features.keys)
        count = len(features.targets)
        for indices in batch_order(count, self.batch_size, self.seed, epoch, self.shuffle, self.smallest)[start:]:
            inputs = features.take(view, indices).to(device)
            yield Batch(inputs.float(), features.targets[indices].to(device), torch.tensor(indices))

    def close(self) -> None:
        """There is nothing to end."""


def features_folder(section: FeaturesSection) -> Path:
    """Where features are kept: `features.dir`, else a folder in the user's cache."""
    return expand(section.dir) if section.dir else cache_folder() / "features"


def _key(digest: bytes, tag: bytes) -> bytes:
    return hashlib.sha256(digest + tag).digest() if tag else digest


def _decoded(
    split: Split, pipeline: Pipeline, missing: Sequence[Missing], size: int, pool: Executor, *, overlap: bool
) -> Iterator[tuple[Sequence[Missing], list[Tensor]]]:
    """Chunks of the missing rows and their images, decoded by threads.

    overlap: decode while what came before is computed. Where the cores do both, taking turns is faster: a thread of
    the network that has to share its core holds up all the others.
    """

    def decode(row: Missing) -> Any:
        picture = split.open(row.image)
        return pipeline.image(picture) if pipeline.deterministic else picture

    blocks = list(_chunks(missing, size if overlap else DECODED_AT_ONCE))
    ahead: list[Future[Any]] = []
    for number, block in enumerate(blocks):
        decoded = [future.result() for future in ahead or [pool.submit(decode, row) for row in block]]
        ahead = [pool.submit(decode, row) for row in blocks[number + 1]] if overlap and number + 1 < len(blocks) else []
        if not pipeline.deterministic:  # torch has one generator for all threads, so the drawing is done in this one
            decoded = [
                pipeline.draw(picture, int.from_bytes(row.key[:8], "little"))
                for picture, row in zip(decoded, block, strict=True)
            ]
        for first in range(0, len(block), size):
            yield block[first : first + size], decoded[first : first + size]


def _chunks(rows: Sequence[Missing], size: int) -> Iterator[Sequence[Missing]]:
    return (rows[first : first + size] for first in range(0, len(rows), size))
