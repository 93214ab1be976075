"""What a run learns from, in a few lines: the images of each class, their sizes, and what guessing would give."""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from tl_trainer.data.dataset import Dataset, Split
from tl_trainer.data.label_texts import UNKNOWN, classes_in, images_of_each
from tl_trainer.ground.wording import listed, printable

log = logging.getLogger(__name__)

WHOLE = 20  # classes up to which all are shown
WIDTH = 80
LONGEST_NAME = 24


@dataclass(frozen=True)
class Overview:
    """The class names, of each split the number of images of each class, and the sizes of all images.

    sizes: width and height of the smallest, the median and the largest by their pixels; empty before they are read.
    images: how many each split has, and unknown: of how many it is not known whether they have a class. Both are empty
    unless an image may have several labels.
    """

    classes: list[str]
    counts: dict[str, list[int]]
    sizes: tuple[tuple[int, int], ...] = ()
    images: dict[str, int] = field(default_factory=dict)
    unknown: dict[str, list[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, dataset: Dataset) -> Overview:
        """Count the images of a dataset, and what is known of their sizes."""
        splits, classes = dataset.splits, len(dataset.classes)
        counts = {name: images_of_each(split.targets, classes) for name, split in splits.items()}
        sizes: Counter[tuple[int, int]] = Counter()
        for split in splits.values():
            sizes.update(split.sizes)
        several = any(isinstance(split.targets[0], tuple) for split in splits.values() if len(split))
        images = {name: len(split) for name, split in splits.items()} if several else {}
        unknown = {name: (np.array(splits[name].targets) == UNKNOWN).sum(axis=0).tolist() for name in images}
        return cls(dataset.classes, counts, _extremes(sizes) if sizes else (), images, unknown)

    @property
    def by_size(self) -> list[int]:
        """The classes, those of the most training images first."""
        return sorted(range(len(self.classes)), key=lambda index: -self.counts["train"][index])

    def baseline(self, split: str) -> float:
        """The majority baseline: how often the class with the most training images is right."""
        most, counts = self.by_size[0], self.counts[split]
        number = self.images[split] - self.unknown[split][most] if self.images else sum(counts)
        return counts[most] / max(1, number)

    def baseline_in_words(self, split: str) -> str:
        """The baseline as a sentence."""
        most = printable(self.classes[self.by_size[0]])
        if self.images:
            images = f"{split} images" + (" where it is known" if self.unknown[split][self.by_size[0]] else "")
            return f"the most frequent label of train, {most}, is on {self.baseline(split):.1%} of the {images}"
        return f"always saying {most} would be right for {self.baseline(split):.1%} of the {split} images"

    def sizes_in_words(self) -> str:
        """The sizes as a sentence."""
        smallest, median, largest = (f"{width} x {height}" for width, height in self.sizes)
        if smallest == largest:
            return f"every image has {median} pixels"
        return f"image sizes in pixels: {smallest} (smallest), {median} (median), {largest} (largest)"

    def shown(self) -> dict[int, str]:
        """The classes to show, each with a remark: all of them, or of more than WHOLE three."""
        if len(self.classes) <= WHOLE:
            return dict.fromkeys(range(len(self.classes)), "")
        order = self.by_size
        return {order[0]: "largest", order[len(order) // 2]: "median", order[-1]: "smallest"}

    def lines(self) -> list[str]:
        """The classes in columns of WIDTH characters, the sizes, and the baseline."""
        title = f"images {'with each label' if self.images else 'of each class'} ({'/'.join(self.counts)})"
        sizes = [self.sizes_in_words()] if self.sizes else []
        if all(len({*counts}) == 1 for counts in self.counts.values()) and len(self.classes) > WHOLE:
            alike = "/".join(f"{counts[0]:,}" for counts in self.counts.values())
            return [f"{title}: {alike}", *sizes, self.baseline_in_words("val")]
        cells = []
        for index, remark in self.shown().items():
            name = printable(self.classes[index])
            name = name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…"
            numbers = "/".join(f"{counts[index]:,}" for counts in self.counts.values())
            cells.append((f"{remark}: {name}" if remark else name, numbers))
        left, right = (max(len(cell[side]) for cell in cells) for side in (0, 1))
        columns = max(1, (WIDTH - 2) // (left + right + 3))
        texts = [f"{name:{left}} {numbers:>{right}}" for name, numbers in cells]
        rows = ["  " + "  ".join(texts[first : first + columns]) for first in range(0, len(texts), columns)]
        return [f"{title}:", *rows, *sizes, self.baseline_in_words("val")]


def _extremes(sizes: Counter[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The smallest, the median and the largest by their pixels; the median is one that an image has."""
    ordered = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    up_to = [*accumulate(sizes[size] for size in ordered)]
    return ordered[0], ordered[bisect_right(up_to, (up_to[-1] - 1) // 2)], ordered[-1]


def name_scarce(dataset: Dataset, train: Split, *, drawn: bool) -> None:
    """Say which classes have to be learned from one image, where the val split is the dataset's own, and which have
    lost all theirs."""
    number = len(dataset.classes)
    left, had = images_of_each(train.targets, number), images_of_each(dataset.split("train").targets, number)
    single = [repr(name) for name, count in zip(dataset.classes, left, strict=True) if count == 1]
    lost = [repr(name) for name, now, once in zip(dataset.classes, left, had, strict=True) if once and not now]
    if single and not drawn:
        log.warning("train has one image of %s; a class is learned from several", listed(single))
    if lost:
        what = "train has no image of %s left, and what was never seen is not predicted; replace them or remove it"
        log.warning(what, listed(lost))


def name_absent(classes: list[str], split: Split, place: str, follows: str) -> None:
    """Say which classes have no image in a split; follows: what the figures make of them."""
    present = classes_in(split.targets)
    if absent := [repr(name) for label, name in enumerate(classes) if label not in present]:
        log.warning("%s has no image of %s; %s", place, listed(absent), follows)
