"""Rows with labels that are texts -> classes and splits, whatever table or archive lists them; all of it as columns."""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from tl_trainer.data.dataset import SPLIT_NAMES, Dataset, Fit, Images, Split
from tl_trainer.data.label_texts import Heads, LabelTexts, several_in_one
from tl_trainer.errors import DataError
from tl_trainer.ground.wording import listed, printable, unknown

log = logging.getLogger(__name__)

LONGEST_LABEL = 1_000  # characters
MOST_CLASSES, FEWEST_ROWS = 0.5, 20  # more labels than this share of so many rows are numbers or names, not classes
_NUMBER = re.compile(r"-?(0|[1-9]\d*)")


def is_label(text: str) -> bool:
    """Whether it can be the name of a class, which stands on one line."""
    return bool(text) and "\n" not in text and len(text) <= LONGEST_LABEL


class ClassNames(NamedTuple):
    """The class list that comes with a source, and where it is."""

    names: list[str]
    where: str


@dataclass(frozen=True)
class Listing:
    """The rows of a source whose labels are texts.

    names: the different labels. labels: (N,) which of them each row has. splits: the rows of each split, or of `all`.
    where: what messages call the source. place: what they call a row. groups: as in Split, of each row. several: how
    the texts are read where an image may have several labels.
    """

    images: Images
    names: Sequence[str]
    labels: np.ndarray
    splits: dict[str, np.ndarray]
    where: str
    place: Callable[[int], str]
    groups: Sequence[str] = ()
    several: LabelTexts | None = None

    def train_labels(self) -> list[str]:
        """The labels of the training rows, sorted. Raises DataError where there is no such row."""
        rows = [self.splits[name] for name in ("train", "all") if name in self.splits]
        if not rows:
            raise DataError(f"{self.where}: no row is in the train split")
        codes = np.unique(self.labels[np.concatenate(rows)]).tolist()
        if self.several is None:
            return sorted(self.names[label] for label in codes)
        values = self._values(self.several)
        had = [[label for label, value in values[code].items() if value == 1] for code in codes]
        if codes and not isinstance(self.several, Heads) and all(len(labels) == 1 for labels in had):
            if several := several_in_one(sorted({*self.names})):
                what = "%s: labels such as %r look like several in one; separate them with label_separator=%r"
                log.warning(what, self.where, *several)
            else:
                what = "%s: every image has exactly one label; data.task: single makes classes that exclude each other"
                log.warning(what, self.where)
        try:
            return self.several.classes(label for labels in had for label in labels)
        except ValueError as error:
            raise DataError(f"{self.where}: {error}") from None

    def _values(self, several: LabelTexts) -> list[dict[str, int]]:
        """What each of the different texts says; DataError for one that is wrong."""
        values = []
        for code, text in enumerate(self.names):
            try:
                values.append(several.values(text))
            except ValueError as error:
                raise DataError(f"{printable(self.place(self._row(code)))}: {error}") from None
        return values

    def _row(self, code: int) -> int:
        """The first row with the text of that number."""
        return int(np.flatnonzero(self.labels == code)[0])

    def check_classes(self, classes: list[str], column: str, key: str) -> None:
        """Raise DataError where a column holds other things than classes; `key` chooses another one."""
        rows = len(self.labels)
        if len(classes) > MOST_CLASSES * rows and rows >= FEWEST_ROWS:
            raise DataError(
                f"{self.where}: {len(classes):,} different labels in {rows:,} rows, such as {listed(classes, 3)}; is "
                f"{column} the column of the classes? set {key}"
            )

    def dataset(self, classes: list[str], fixed_by: str, fit: Fit = "exact") -> Dataset:
        """The dataset with these classes, in this order.

        A split may lack some of them, since labels are names here and no index can shift, but may not have others,
        unless `fit` allows it: DataError names the first row that has.
        """
        if self.several is not None:
            return self._of_several(self.several, classes, fixed_by, fit)
        index = {label: position for position, label in enumerate(classes)}
        target = np.array([index.get(name, -1) for name in self.names])
        splits = {}
        for name in (split for split in (*SPLIT_NAMES, "all") if split in self.splits):
            rows = self.splits[name]
            targets = target[self.labels[rows]]
            if (extra := rows[targets < 0]).size:
                if fit != "any":
                    more = "; --ignore-extra leaves such rows out" if fit == "fewer" else ""
                    wrong = unknown("label", self.names[self.labels[extra[0]]], classes)
                    raise DataError(f"{printable(self.place(int(extra[0])))}: {wrong}, fixed by {fixed_by}{more}")
                what = "%s: %d rows left out, since their labels are no classes of %s"
                log.warning(what, self.where, len(extra), fixed_by)
                rows, targets = rows[targets >= 0], targets[targets >= 0]
            groups = [self.groups[row] for row in rows] if self.groups else ()
            splits[name] = Split(self.images, _integers(targets), _integers(rows), groups=groups)
        return Dataset(classes, splits, self.where)

    def _of_several(self, several: LabelTexts, classes: list[str], fixed_by: str, fit: Fit) -> Dataset:
        """The dataset of images with several labels; where others may be there too, these are left out of images."""
        values, known = self._values(several), {*classes}
        extra = [(code, label) for code, of in enumerate(values) for label in of if label not in known]
        if extra and fit != "any":
            code, label = extra[0]
            more = "; --ignore-extra leaves such labels out" if fit == "fewer" else ""
            wrong = unknown("label", label, classes)
            raise DataError(f"{printable(self.place(self._row(code)))}: {wrong}, fixed by {fixed_by}{more}")
        if extra:
            log.warning(
                "%s: labels that %s does not have are left out: %s",
                self.where,
                fixed_by,
                listed(sorted({label for _, label in extra})),
            )
            values = [{name: value for name, value in of.items() if name in known} for of in values]
        targets = [tuple(of[name] if name in of else several.absent(name, of) for name in classes) for of in values]
        splits = {}
        for name in (split for split in (*SPLIT_NAMES, "all") if split in self.splits):
            rows = self.splits[name]
            groups = [self.groups[row] for row in rows] if self.groups else ()
            of_rows = [targets[code] for code in self.labels[rows].tolist()]  # one object for all alike
            splits[name] = Split(self.images, of_rows, _integers(rows), groups=groups)
        return Dataset(classes, splits, self.where)

    def named(self, known: ClassNames | None, remedy: str, classes: list[str] | None, fit: Fit) -> Dataset:
        """The dataset of labels that are names, or numbers of the names in `known`, counted from 0; which is said.

        Without `known` numbers are names themselves, in their order; the remedy says what would name them. classes: a
        checkpoint's, which count before both. Raises DataError for a number that no name has.
        """
        numbers = all(map(_NUMBER.fullmatch, self.names))
        listing = self._numbered(known) if known and numbers else self
        if classes is not None:
            return listing.dataset(classes, "the checkpoint", fit)
        trained = listing.train_labels()
        if known is None:
            trained = sorted(trained, key=int) if numbers else trained
            said = f"numbers, which are taken as the names of the classes; {remedy}" if numbers else "names"
            log.info("%s: %d classes; labels are %s", self.where, len(trained), said)
            return listing.dataset(trained, "the train rows", fit)
        said = "numbers of names" if numbers else "names"
        log.info("%s: %d classes; labels are %s in %s", self.where, len(known.names), said, known.where)
        dataset = listing.dataset(known.names, known.where, fit)
        if absent := sorted({*known.names} - {*trained}):
            log.warning("%s: train has no row of %d classes: %s", self.where, len(absent), listed(absent))
        return dataset

    def _numbered(self, known: ClassNames) -> Listing:
        most = len(known.names)
        for label, number in enumerate(self.names):
            if not 0 <= int(number) < most:
                raise DataError(
                    f"{printable(self.place(self._row(label)))}: label {number} is not one of 0 to {most - 1}, the "
                    f"{most} names in {known.where}; correct the label, or the names"
                )
        return replace(self, names=[known.names[int(number)] for number in self.names])


def _integers(values: np.ndarray) -> array[int]:
    """As a sequence of Python's numbers, 8 bytes each."""
    return array("q", values.astype(np.int64).tobytes())
