"""What a run learns from, in a few lines: the classes with their images, and what guessing would give."""

from __future__ import annotations

from dataclasses import dataclass

from tl_trainer.data.dataset import Dataset
from tl_trainer.ground.wording import printable

WHOLE = 20  # classes up to which all are shown
WIDTH = 80
LONGEST_NAME = 24


@dataclass(frozen=True)
class Overview:
    """The class names, and of each split the number of images of each class."""

    classes: list[str]
    counts: dict[str, list[int]]

    @classmethod
    def of(cls, dataset: Dataset) -> Overview:
        """Count the images of a dataset."""
        counts = {name: [0] * len(dataset.classes) for name in dataset.splits}
        for name, split in dataset.splits.items():
            for target in split.targets:
                counts[name][target] += 1
        return cls(dataset.classes, counts)

    @property
    def by_size(self) -> list[int]:
        """The classes, those of the most training images first."""
        return sorted(range(len(self.classes)), key=lambda index: -self.counts["train"][index])

    def baseline(self, split: str) -> float:
        """The majority baseline: how often the class with the most training images is right."""
        return self.counts[split][self.by_size[0]] / sum(self.counts[split])

    def baseline_in_words(self, split: str) -> str:
        """The baseline as a sentence."""
        most = printable(self.classes[self.by_size[0]])
        return f"always saying {most} would be right for {self.baseline(split):.1%} of the {split} images"

    def shown(self) -> dict[int, str]:
        """The classes to show, each with a remark: all of them, or of more than WHOLE three."""
        if len(self.classes) <= WHOLE:
            return dict.fromkeys(range(len(self.classes)), "")
        order = self.by_size
        return {order[0]: "largest", order[len(order) // 2]: "median", order[-1]: "smallest"}

    def lines(self) -> list[str]:
        """The classes in columns of WIDTH characters, and the baseline."""
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
        return [f"images of each class ({'/'.join(self.counts)}):", *rows, self.baseline_in_words("val")]
