"""Classes and splits: what every source becomes, and the rules that hold for all of them.

The class list is fixed by the training split (lexicographic folder order, as torchvision's ImageFolder) and enforced on
every other one: a missing or an extra class is an error that names it, never a shifted index.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from tl_trainer.data import images
from tl_trainer.errors import DataError

# Each split and the names its folder or its value in a CSV column may have.
SPLIT_NAMES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}


@dataclass(frozen=True)
class Split:
    """Images and their labels. `names` is what errors, predictions and split.csv call an image.

    The images are files at `paths`, or else rows of `pictures`, a dataset that holds them in memory. `digests` are the
    SHA-256 of the files, once they were read: from then on only these very images are opened.
    """

    names: Sequence[str]
    targets: Sequence[int]
    paths: Sequence[Path] | None = None
    pictures: Any = None
    rows: Sequence[int] = ()
    digests: Sequence[bytes] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def open(self, index: int) -> Image.Image:
        """The image as upright RGB; ImageError, naming it, where it cannot be read."""
        if self.paths is not None:
            return images.load(self.paths[index], self.digests[index] if self.digests else b"")
        return images.to_rgb(self.pictures[self.rows[index]][0])

    def subset(self, indices: Sequence[int]) -> Split:
        """The images at `indices`, in that order."""
        return Split(
            [self.names[i] for i in indices],
            [self.targets[i] for i in indices],
            None if self.paths is None else [self.paths[i] for i in indices],
            self.pictures,
            [self.rows[i] for i in indices] if self.rows else (),
            [self.digests[i] for i in indices] if self.digests else (),
        )


@dataclass(frozen=True)
class Dataset:
    """The class names in index order and the splits that exist, of train, val, test (or only `all`)."""

    classes: list[str]
    splits: dict[str, Split]
    where: str

    def split(self, name: str) -> Split:
        """The split called `name`; DataError, listing those there are, where it is missing."""
        if name not in self.splits:
            raise DataError(f"{self.where} has no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]


def with_validation(dataset: Dataset, fraction: float, seed: int, val_names: Iterable[str] | None = None) -> Dataset:
    """The dataset with a val split, drawn from train (or `all`) where it has none of its own: stratified, seeded.

    `val_names` is a split drawn before (by the run that is resumed or evaluated) and is taken instead of a new draw.
    """
    if "val" in dataset.splits or ("train" not in dataset.splits and "all" not in dataset.splits):
        return dataset
    splits = dict(dataset.splits)
    source = splits.pop("all") if "all" in splits else splits["train"]
    if val_names is None:
        held_out = _draw(source, fraction, seed, dataset.classes)
    else:
        position = {name: index for index, name in enumerate(source.names)}
        if missing := [name for name in val_names if name not in position]:
            raise DataError(
                f"{dataset.where}: {len(missing)} images of the run's val split are gone, e.g. {missing[0]}"
            )
        held_out = {position[name] for name in val_names}
    splits["train"] = source.subset([i for i in range(len(source)) if i not in held_out])
    splits["val"] = source.subset(sorted(held_out))
    return Dataset(dataset.classes, {name: splits[name] for name in SPLIT_NAMES if name in splits}, dataset.where)


def enforce_classes(expected: Sequence[str], found: Iterable[str], where: object, fixed_by: str) -> None:
    """Raise DataError naming the classes that are missing from or extra in `found`."""
    found = set(found)
    missing, extra = [name for name in expected if name not in found], sorted(found.difference(expected))
    faults = []
    for word, names in (("no", missing), ("an extra", extra)):
        if names:
            faults.append(f"{word} class {', '.join(map(repr, names[:5]))}{' and more' if len(names) > 5 else ''}")
    if faults:
        raise DataError(
            f"{where} has {' and '.join(faults)}; the {len(expected)} classes are fixed by {fixed_by} and must be the "
            "same here: add, rename or remove what differs"
        )


def fingerprint(split: Split) -> str:
    """The SHA-256 of names, labels and, of files that were read, contents in order: what a batch holds."""
    digest = hashlib.sha256()
    contents = split.digests or [b""] * len(split)
    for name, target, content in zip(split.names, split.targets, contents, strict=True):
        digest.update(f"{name}\0{target}\n".encode("utf-8", "surrogateescape") + content)
    return digest.hexdigest()


def _draw(split: Split, fraction: float, seed: int, classes: list[str]) -> set[int]:
    rng = random.Random(seed)
    by_class: dict[int, list[int]] = {label: [] for label in range(len(classes))}
    for index, label in enumerate(split.targets):
        by_class[label].append(index)
    held_out: set[int] = set()
    for label, indices in by_class.items():
        if len(indices) < 2:
            raise DataError(
                f"class {classes[label]!r} has {len(indices)} image(s); a val split needs at least 2 of each"
            )
        count = min(max(1, round(len(indices) * fraction)), len(indices) - 1)
        held_out.update(rng.sample(indices, count))
    return held_out
