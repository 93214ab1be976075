"""Texts of a table -> the labels of an image that may have several.

A target has a number for each class: 1 where the image has it, 0 where it has not, UNKNOWN where nobody says.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from tl_trainer.config.data import LabelledSection
from tl_trainer.ground.wording import listed, shown

UNKNOWN = -1
SEVERAL = 0.1  # of the labels, above which those that are made of others are named
BETWEEN = "\0"  # the values of columns that are read as one text; no white space, which is stripped
VALUES = {"1": 1, "0": 0, "": UNKNOWN, "1.0": 1, "0.0": 0, "true": 1, "false": 0}


def several_in_one(names: Sequence[str]) -> tuple[str, str] | None:
    """A name that looks like several labels in one, and what separates them, where many do."""
    for separator in "|;, ":
        parts = {label: [part.strip() for part in label.split(separator)] for label in names if separator in label}
        known = {label for label in names if label not in parts}
        if separator != " ":  # "polar bear" and "brown bear" share a word, and are one label each
            times = Counter(part for several in parts.values() for part in several)
            known |= {part for part, count in times.items() if count > 1}
        several = [label for label, split in parts.items() if known.issuperset(split)]
        if len(several) > SEVERAL * len(names):
            return several[0], separator
    return None


class LabelTexts(Protocol):
    """How a text says which labels an image has."""

    def absent(self, label: str, values: Mapping[str, int]) -> int:
        """The value of a class that a text with these values does not mention."""

    def values(self, text: str) -> dict[str, int]:
        """The value of each label that the text mentions. Raises ValueError, with the remedy, where it is wrong."""

    def classes(self, mentioned: Iterable[str]) -> list[str]:
        """The class list, from the labels that training images have."""


@dataclass(frozen=True)
class Separated:
    """The labels of an image stand in one text, with a separator between them."""

    separator: str

    def absent(self, label: str, values: Mapping[str, int]) -> int:
        """0."""
        return 0

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

    def absent(self, label: str, values: Mapping[str, int]) -> int:
        """UNKNOWN."""
        return UNKNOWN

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


IS, HAS = "=", ":"  # between the name of a head and a class: an image has one of them, or any number
_HEAD = re.compile(f"(.*?)([{IS}{HAS}])(.*)", re.DOTALL)


@dataclass(frozen=True)
class Heads:
    """Each head has a column, with one class or, of `several`, any number of labels with a separator between them."""

    columns: Sequence[str]
    several: Sequence[str]
    separator: str

    def values(self, text: str) -> dict[str, int]:
        """1 for what the image is; ValueError where no head has a label."""
        found: dict[str, int] = {}
        for column, value in zip(self.columns, map(str.strip, text.split(BETWEEN)), strict=True):
            if column in self.several:
                labels = Separated(self.separator).values(value)
                found |= {f"{column}{HAS}{label}": 1 for label in labels}
            elif value:
                found[f"{column}{IS}{value}"] = 1
        if not found and not self.several:
            raise ValueError(f"no label in any of {listed(self.columns)}; fill in one, or leave the row out")
        return found

    def absent(self, label: str, values: Mapping[str, int]) -> int:
        """0, but UNKNOWN where its head has one class per image and no label here."""
        head, sign, _ = head_of(label)
        return 0 if sign == HAS or any(head_of(other)[:2] == (head, sign) for other in values) else UNKNOWN

    def classes(self, mentioned: Iterable[str]) -> list[str]:
        """Those of each column in turn, sorted. Raises ValueError for a column with fewer classes than it needs."""
        of_column: dict[str, set[str]] = {column: set() for column in self.columns}
        for label in mentioned:
            of_column[head_of(label)[0]].add(label)
        for column, found in of_column.items():
            if len(found) < (least := 1 if column in self.several else 2):
                raise ValueError(
                    f"the column {column} has {len(found)} classes in the train rows, and a head needs {least} or "
                    "more; leave it out of label_columns"
                )
        return [label for found in of_column.values() for label in sorted(found)]


def head_of(label: str) -> tuple[str, str, str]:
    """The head of a class, IS or HAS, and what the class is called there."""
    match = _HEAD.fullmatch(label)
    assert match is not None, label
    return match[1], match[2], match[3]


def heads_in(classes: Sequence[str]) -> list[tuple[str, bool, list[str]]]:
    """The heads of a class list, in order: name, whether an image may have several of its classes, their own names."""
    found: dict[str, tuple[bool, list[str]]] = {}
    for label in classes:
        head, sign, name = head_of(label)
        found.setdefault(head, (sign == HAS, []))[1].append(name)
    return [(head, several, names) for head, (several, names) in found.items()]


def label_texts(task: str, section: LabelledSection) -> LabelTexts | None:
    """How the texts of a table are read; None where each is the class of its image."""
    if task == "single":
        return None
    if task == "multitask":
        return Heads(section.label_columns, section.multilabel_columns, section.label_separator)
    return InColumns(section.label_columns) if section.label_columns else Separated(section.label_separator)


def classes_in(targets: Iterable[Any]) -> set[int]:
    """The classes that some of the targets have."""
    different = {*targets}
    if any(isinstance(target, tuple) for target in different):
        return {label for target in different for label, value in enumerate(target) if value == 1}
    return different


def differ(first: Any, second: Any) -> bool:
    """Whether two targets contradict each other; what is not known does not."""
    if isinstance(first, tuple):
        return any(one != other and UNKNOWN not in (one, other) for one, other in zip(first, second, strict=True))
    return bool(first != second)


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
