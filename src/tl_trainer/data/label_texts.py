"""Texts of a table -> the labels of an image that may have several.

A target has a number for each class: 1 where the image has it, 0 where it has not, UNKNOWN where nobody says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tl_trainer.config.data import LabelledSection
from tl_trainer.ground.wording import shown

UNKNOWN = -1
BETWEEN = "\0"  # the values of columns that are read as one text; no white space, which is stripped
VALUES = {"1": 1, "0": 0, "": UNKNOWN, "1.0": 1, "0.0": 0, "true": 1, "false": 0}


class LabelTexts(Protocol):
    """How a text says which labels an image has."""

    @property
    def absent(self) -> int:
        """The value of a class that a text does not mention."""

    def values(self, text: str) -> dict[str, int]:
        """The value of each label that the text mentions. Raises ValueError, with the remedy, where it is wrong."""

    def classes(self, mentioned: Iterable[str]) -> list[str]:
        """The class list, from the labels that training images have."""


@dataclass(frozen=True)
class Separated:
    """The labels of an image stand in one text, with a separator between them."""

    separator: str
    absent: int = 0

    def values(self, text: str) -> dict[str, int]:
        """1 for each label."""
        labels = [label.strip() for label in text.split(self.separator)] if text else []
        if "" in labels:
            raise ValueError(
                f"an empty label in {shown(text)}; labels are separated by {self.separator!r}, so no name may have it: "
                "correct the row, or set another label_separator"
            )
        return dict.fromkeys(labels, 1)

    def classes(self, mentioned: Iterable[str]) -> list[str]:
        """Sorted."""
        return sorted({*mentioned})


@dataclass(frozen=True)
class InColumns:
    """Each label has a column, which says 1, 0, or nothing where it is not known."""

    columns: Sequence[str]
    absent: int = UNKNOWN

    def values(self, text: str) -> dict[str, int]:
        """One for each column."""
        values = [*zip(self.columns, text.split(BETWEEN), strict=True)]
        if wrong := [(column, value) for column, value in values if value.strip().lower() not in VALUES]:
            column, value = wrong[0]
            raise ValueError(f"{column} is {shown(value)}; write 1, 0, or nothing where it is not known")
        return {column: VALUES[value.strip().lower()] for column, value in values}

    def classes(self, mentioned: Iterable[str]) -> list[str]:
        """In the order of the columns. Raises ValueError for one that no training image has."""
        known = {*mentioned}
        if missing := [column for column in self.columns if column not in known]:
            raise ValueError(f"no train image has the label {missing[0]!r}; leave its column out of label_columns")
        return [*self.columns]


def label_texts(task: str, section: LabelledSection) -> LabelTexts | None:
    """How the texts of a table are read; None where each is the class of its image."""
    if task == "single":
        return None
    return InColumns(section.label_columns) if section.label_columns else Separated(section.label_separator)


def classes_in(targets: Iterable[Any]) -> set[int]:
    """The classes that some of the targets have."""
    different = {*targets}
    if any(isinstance(target, tuple) for target in different):
        return {label for target in different for label, value in enumerate(target) if value == 1}
    return different


def is_target(value: object, classes: int) -> bool:
    """Whether it can be the target of an image: the index of a class, or a number for each."""
    if isinstance(value, tuple):
        return len(value) == classes and {*value} <= {0, 1, UNKNOWN}
    return isinstance(value, int) and 0 <= value < classes


def images_of_each(targets: Iterable[Any], classes: int) -> list[int]:
    """How many of the targets have each class."""
    counts = [0] * classes
    for target, images in Counter(targets).items():
        labels = [target] if isinstance(target, int) else [at for at, value in enumerate(target) if value == 1]
        for label in labels:
            counts[label] += images
    return counts
