"""A CSV file of image names and labels -> classes and splits."""

from __future__ import annotations

import csv
import logging
import os
from array import array
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tl_trainer.config.data import CsvSection
from tl_trainer.data.dataset import SPLIT_OF, Below, Dataset, Files, Fit
from tl_trainer.data.images import ENDINGS
from tl_trainer.data.label_texts import BETWEEN, label_texts, several_in_one
from tl_trainer.data.listing import Listing
from tl_trainer.errors import DataError
from tl_trainer.ground.wording import unknown

if TYPE_CHECKING:
    from _csv import Reader

log = logging.getLogger(__name__)

SPLIT_COLUMNS = ("split", "subset", "partition")  # what such a column is called, where the configuration names none
SAMPLE = 20  # rows whose images are looked for before any is read


class Columns(NamedTuple):
    """The file's columns, an entry per image: its line, its name, its label, its group (or no entry).

    A label is the number of its `names`; `splits` has the entries of each split.
    """

    lines: array[int]
    images: list[str]
    names: list[str]
    labels: array[int]
    splits: dict[str, array[int]]
    groups: list[str]


def open_csv(
    root: Path, section: CsvSection, classes: list[str] | None, fit: Fit = "exact", task: str = "single"
) -> Dataset:
    """The dataset of a CSV file; without a split column it has one split, `all`. Raises DataError with file:line.

    The classes are the sorted labels of the train rows. task: as `data.task`.
    """
    table, several = root / section.labels, label_texts(task, section)
    columns = _columns(table, section, several is not None)
    lines, images, names, labels, splits, groups = columns
    rows = {split: np.array(rows) for split, rows in splits.items()}
    files = Files(Below(root / section.images, images), images)
    listing = Listing(
        files, names, np.array(labels), rows, str(table), lambda row: f"{table}:{lines[row]}", groups, several
    )
    if classes is not None:
        return listing.dataset(classes, "the checkpoint", fit)
    classes = listing.train_labels()
    listing.check_classes(classes, section.label_column, "data.csv.label_column")
    if several is None and (found := several_in_one(classes)):
        log.warning(
            "%s: labels such as %r look like several labels in one, and each becomes a class of its own; to have "
            "images with several labels: data.task=multilabel data.csv.label_separator=%r",
            *(table, *found),
        )
    return listing.dataset(classes, "the train rows", fit)


def check_found(dataset: Dataset, section: CsvSection) -> None:
    """Raise DataError where none of some images is there, with the key that would find them."""
    paths = [str(split.images.paths[row]) for split in dataset.splits.values() if isinstance(split.images, Files)
             for row in split.rows[:: -(-len(split) // SAMPLE)]]  # fmt: skip
    if any(map(os.path.exists, paths)):
        return
    tried, key = paths[0], "data.csv.images to the folder of the images"
    bare = tried.removesuffix(section.suffix)
    if section.suffix and os.path.exists(bare):  # noqa: PTH110
        key = f"data.csv.suffix= (to nothing), since {bare} is there"
    elif ending := next((ending for ending in ENDINGS if os.path.exists(bare + ending)), None):  # noqa: PTH110
        key = f"data.csv.suffix={ending}, since {bare}{ending} is there"
    raise DataError(f"{dataset.where}: {tried} is not there, nor are others that it names; set {key}")


def _columns(table: Path, section: CsvSection, several: bool) -> Columns:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            header = next(filter(str.strip, file), "")
            file.seek(0)
            columns = _read(csv.reader(file, delimiter=max(",;\t", key=header.count)), table, section, several)
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror}; set data.root and data.csv.labels") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a CSV file in UTF-8: {error}; save it as CSV in UTF-8") from error
    if not columns.images:
        raise DataError(f"{table}: no rows below the header")
    hashes = np.sort(np.fromiter(map(hash, columns.images), np.int64, len(columns.images)))
    if (hashes[1:] == hashes[:-1]).any():  # perhaps a copy; a set of all names takes four times the memory
        first: dict[str, int] = {}
        for line, image in zip(columns.lines, columns.images, strict=True):
            if image in first:
                raise DataError(f"{table}:{line}: {image!r} is in line {first[image]} too; keep one of the two")
            first[image] = line
    return columns


def _read(reader: Reader, table: Path, section: CsvSection, several: bool) -> Columns:
    """several: whether an image may have no label, or more than one."""
    label_columns = section.label_columns or [section.label_column]
    asked = [("image_column", section.image_column)]
    asked += [("label_columns" if section.label_columns else "label_column", column) for column in label_columns]
    asked += [("split_column", section.split_column or ""), ("group_column", section.group_column or "")]
    asked = [(f"data.csv.{key}", column) for key, column in asked if column]
    wanted, rest_from = [column for _, column in asked], 1 + len(label_columns)
    header = next(filter(None, reader), None)  # blank lines are no rows
    if header is None:
        raise DataError(f"{table}: empty file; its first line must name the columns")
    place = {name: index for index, name in enumerate(header)}
    if missing := [(key, column) for key, column in asked if column not in place]:
        keys = dict.fromkeys(key for key, _ in missing)
        raise DataError(
            f"{table}:1: {unknown('column', missing[0][1], header)}; set {' and '.join(keys)} to the right one"
        )
    unread = [name for name in header if name.lower() in SPLIT_COLUMNS and not section.split_column]
    for name in unread:
        log.warning(
            "%s: its column %s is not read; data.csv.split_column=%s takes the splits from it", table, name, name
        )
    places, width, suffix = [place[column] for column in wanted], len(header), section.suffix
    lines, images, names, labels, splits, groups = columns = Columns(array("q"), [], [], array("q"), {}, [])
    number: dict[str, int] = {}  # of each label
    one: dict[str, str] = {}  # object for each group
    for row in filter(None, reader):
        if len(row) > width:
            raise DataError(
                f"{table}:{reader.line_num}: more values than the header has columns; put values with a separator in "
                "them into quotes"
            )
        if len(row) < width:
            row += [""] * (width - len(row))
        values = [row[index].strip() for index in places]
        image, label, rest = values[0], BETWEEN.join(values[1:rest_from]), values[rest_from:]
        if "" in values and (not several or "" in (image, *rest)):
            empty = next(at for at, value in enumerate(values) if not value and not (several and 0 < at < rest_from))
            raise DataError(f"{table}:{reader.line_num}: no {wanted[empty]} in this row")
        split = SPLIT_OF.get(rest[0].lower()) if section.split_column else "all"
        if split is None:
            raise DataError(f"{table}:{reader.line_num}: {unknown('split', rest[0], SPLIT_OF)}")
        splits.setdefault(split, array("q")).append(len(lines))
        lines.append(reader.line_num)
        images.append(image + suffix)
        labels.append(number.setdefault(label, len(number)))
        if section.group_column:
            groups.append(one.setdefault(rest[-1], rest[-1]))
    names.extend(number)
    return columns
