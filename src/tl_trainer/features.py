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
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from tl_trainer.config.schema import FeaturesSection, expand
from tl_trainer.data.content import content_hashes, forget
from tl_trainer.data.dataset import Split
from tl_trainer.data.loaders import Batch, batch_order, cores, known, stacked, without_bad
from tl_trainer.data.transforms import Pipeline
from tl_trainer.errors import ImageError, InputError, printable
from tl_trainer.feature_store import FeatureStore, make_room
from tl_trainer.files import cache_folder, make_folder
from tl_trainer.models.prefix import FrozenPrefix

log = logging.getLogger(__name__)

# Small enough for the activations to stay in a processor's caches, large enough for a GPU to be busy.
IMAGES_AT_ONCE = {"cpu": 16, "cuda": 128}
DECODED_AT_ONCE = 64  # where decoding and computing take turns: enough for all threads to end at about the same time
EVALUATED_AT_ONCE = 1024

Missing = tuple[bytes, int, bytes]  # a row's key, the image's index in the split, the view's tag
Item = TypeVar("Item")


@dataclass
class Extractor:
    """Computes and keeps the features of splits. `make_prefix(n)` gives the network, called only if n rows are missing.

    identity: what decides a feature's value besides the image, as plain data. computed: rows computed so far.
    """

    make_prefix: Callable[[int], FrozenPrefix]
    identity: dict[str, Any]
    folder: Path
    limit: int
    device: torch.device
    computed: int = field(default=0, init=False)

    @property
    def memory(self) -> Path:
        """What `content_hashes` remembers by."""
        return self.folder / "files.sqlite"

    def features(
        self, split: Split, what: str, pipeline: Pipeline, on_bad_image: str, views: int = 1, seed: int = 0
    ) -> Features:
        """The features of every image of the split, from the cache where they are there.

        what: what messages call the split; nothing is said where it is empty. With random transforms, `views` of each
        image are drawn, each from (seed, view, image). Raises DataError for images that cannot be read, unless they
        are to be skipped.
        """
        tags = [f"{seed} {view}".encode() if not pipeline.deterministic else b"" for view in range(views)]
        make_folder(self.folder, "features.dir")
        with ThreadPoolExecutor(cores()) as pool:
            hashes = content_hashes(split, self.memory, pool)
            split = known(split, hashes)
            bad = {index: str(digest) for index, digest in enumerate(hashes) if isinstance(digest, ImageError)}
            store = self._store(pipeline)
            wanted = {}
            for index, digest in enumerate(hashes):
                if isinstance(digest, bytes):
                    wanted.update({_key(digest, tag): (index, tag) for tag in tags})
            missing = [(key, *wanted[key]) for key in store.find(wanted)]
            before = self.computed
            if missing:
                bad.update(self._compute(split, what, pipeline, store, missing, pool))
                forget(split, bad, self.memory)  # else a file that was changed with its time kept would stay bad
                bad.update(_bad_copies(split, hashes, bad))
        cached = len(wanted) - len(missing)
        level = logging.INFO if what else logging.DEBUG
        log.log(level, "features of %s: %d computed, %d cached", what, self.computed - before, cached)
        kept = without_bad(split, bad, what, on_bad_image)
        good = [digest for index, digest in enumerate(hashes) if index not in bad and isinstance(digest, bytes)]
        return Features(store, [[_key(digest, tag) for digest in good] for tag in tags], kept)

    def _store(self, pipeline: Pipeline) -> FeatureStore:
        identity = json.dumps({**self.identity, "preprocessing": pipeline.steps}, sort_keys=True)
        store = FeatureStore(self.folder / hashlib.sha256(identity.encode()).hexdigest()[:32])
        os.utime(store.folder)  # when it was used last, for make_room
        return store

    def _compute(
        self,
        split: Split,
        what: str,
        pipeline: Pipeline,
        store: FeatureStore,
        missing: Sequence[Missing],
        pool: Executor,
    ) -> dict[int, str]:
        """Compute and append the missing (key, index, tag) rows; the images that cannot be decoded, with the reason."""
        prefix, roomy = self.make_prefix(len(missing)), False
        bad: dict[int, str] = {}
        size = IMAGES_AT_ONCE.get(self.device.type, 16)
        quiet = not log.isEnabledFor(logging.INFO)
        progress = tqdm(total=len(missing), desc=f"{what} features", unit="img", leave=False, disable=quiet or None)
        with contextlib.closing(store), progress as bar:
            for chunk, decoded in _decoded(split, pipeline, missing, size, pool, overlap=self.device.type != "cpu"):
                good = [
                    (key, item) for (key, _, _), item in zip(chunk, decoded, strict=True) if isinstance(item, Tensor)
                ]
                bad.update(
                    (index, str(item))
                    for (_, index, _), item in zip(chunk, decoded, strict=True)
                    if isinstance(item, ImageError)
                )
                if good:
                    batch = stacked([item for _, item in good])
                    if self.device.type == "cuda":
                        batch = batch.pin_memory()
                    rows = prefix(pipeline.batch(batch.to(self.device, non_blocking=True)))
                    if not roomy:
                        self._check_room(store, rows, len(missing))
                        roomy = True
                    store.append([key for key, _ in good], rows)
                    self.computed += len(good)
                bar.update(len(chunk))
        return bad

    def _check_room(self, store: FeatureStore, rows: Tensor, count: int) -> None:
        needed = rows[0].numel() * rows.element_size() * count
        if needed > self.limit:
            raise InputError(
                f"the features of {count:,} images take {needed / 1e9:.3g} GB, more than features.limit_gb "
                f"({self.limit / 1e9:g}); raise it, tap a later stage, or set features.cache: off"
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

    def __init__(self, features: Features, *, batch_size: int, seed: int = 0, shuffle: bool = False) -> None:
        self.features = features
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle

    def __len__(self) -> int:
        """Batches per epoch."""
        return -(-len(self.features.targets) // self.batch_size)

    def epoch(self, epoch: int, device: torch.device, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on, float32, on `device`."""
        features, view = self.features, epoch % len(self.features.keys)
        for indices in batch_order(len(features.targets), self.batch_size, self.seed, epoch, self.shuffle)[start:]:
            inputs = features.take(view, indices).to(device, non_blocking=True)
            yield Batch(inputs.float(), features.targets[indices].to(device), torch.tensor(indices))


def features_folder(section: FeaturesSection) -> Path:
    """Where features are kept: `features.dir`, else a folder in the user's cache."""
    return expand(section.dir) if section.dir else cache_folder() / "features"


def free_memory() -> int:
    """The bytes of memory that are free for use, caches of the system counted in; 4 GB where that is unknown."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 4_000_000_000


def _key(digest: bytes, tag: bytes) -> bytes:
    return hashlib.sha256(digest + tag).digest() if tag else digest


def _bad_copies(split: Split, hashes: Sequence[bytes | ImageError], bad: dict[int, str]) -> dict[int, str]:
    """The images with the same content as a bad one, which were not decoded: content is computed once."""
    contents, copies = {hashes[index] for index in bad}, {}
    for index, digest in enumerate(hashes):
        if digest in contents and index not in bad:
            try:
                split.open(index)
                copies[index] = (
                    f"{printable(split.names[index])}: is the same as an image that has changed meanwhile; start again"
                )
            except ImageError as error:
                copies[index] = str(error)
    return copies


def _decoded(
    split: Split, pipeline: Pipeline, missing: Sequence[Missing], size: int, pool: Executor, *, overlap: bool
) -> Iterator[tuple[Sequence[Missing], Sequence[Tensor | ImageError]]]:
    """Chunks of the missing rows and their images, decoded by threads.

    overlap: decode while what came before is computed. Where the cores do both, taking turns is faster: a thread of
    the network that has to share its core holds up all the others.
    """

    def decode(row: Missing) -> Any:
        try:
            picture = split.open(row[1])
            return pipeline.image(picture) if pipeline.deterministic else picture
        except ImageError as error:
            return error

    blocks = list(_chunks(missing, size if overlap else DECODED_AT_ONCE))
    ahead: list[Future[Any]] = []
    for number, block in enumerate(blocks):
        decoded = [future.result() for future in ahead or [pool.submit(decode, row) for row in block]]
        ahead = [pool.submit(decode, row) for row in blocks[number + 1]] if overlap and number + 1 < len(blocks) else []
        if not pipeline.deterministic:  # torch has one generator for all threads, so the drawing is done in this one
            decoded = [
                item if isinstance(item, ImageError) else pipeline.draw(item, int.from_bytes(row[0][:8], "little"))
                for item, row in zip(decoded, block, strict=True)
            ]
        yield from zip(_chunks(block, size), _chunks(decoded, size), strict=True)


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    return (items[first : first + size] for first in range(0, len(items), size))
