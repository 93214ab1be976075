"""A CSV file of image names and labels -> classes and splits."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import NamedTuple

from tl_trainer.config.schema import CsvSection
from tl_trainer.data.dataset import SPLIT_NAMES, Dataset, Files, Split
from tl_trainer.errors import DataError
from tl_trainer.ground.wording import unknown


class Row(NamedTuple):
    """One image; `line` is where it stands in the file."""

    line: int
    image: str
    label: str
    split: str


def open_csv(root: Path, section: CsvSection, classes: list[str] | None) -> Dataset:
    """The dataset of a CSV file; without a split column it has one split, `all`. Raises DataError with file:line.

    The classes are the sorted labels of the train rows. Another split may lack some of them, since labels are names
    here and no index can shift, but may not have others.
    """
    table = root / section.labels
    by_split: dict[str, list[Row]] = {}
    for row in _rows(table, section):
        by_split.setdefault(row.split, []).append(row)
    fixed_by = "the checkpoint"
    if classes is None:
        fixed_by = "the train rows"
        if "train" not in by_split and "all" not in by_split:
            raise DataError(f"{table}: no row is in the train split")
        classes = sorted({row.label for row in by_split.get("train", by_split.get("all", []))})
    index = {label: position for position, label in enumerate(classes)}
    splits = {}
    for name in (split for split in (*SPLIT_NAMES, "all") if split in by_split):
        for row in by_split[name]:
            if row.label not in index:
                raise DataError(f"{table}:{row.line}: {unknown('label', row.label, classes)}, fixed by {fixed_by}")
        names = [row.image for row in by_split[name]]
        targets = [index[row.label] for row in by_split[name]]
        files = Files([root / section.images / image for image in names], names)
        splits[name] = Split(files, targets, range(len(names)))
    return Dataset(classes, splits, str(table))


def _rows(table: Path, section: CsvSection) -> list[Row]:
    aliases = {alias: split for split, names in SPLIT_NAMES.items() for alias in names}
    columns = [section.image_column, section.label_column, *filter(None, [section.split_column])]
    rows = []
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            header = reader.fieldnames
            if header is None:
                raise DataError(f"{table}: empty file; its first line must name the columns")
            for column in columns:
                if column not in header:
                    raise DataError(f"{table}:1: {unknown('column', column, header)}; set the columns in data.csv")
            for record in reader:
                if None in record:
                    raise DataError(f"{table}:{reader.line_num}: more values than columns; quote those with a comma")
                values = [(record[column] or "").strip() for column in columns]
                if not all(values):
                    missing = columns[[bool(value) for value in values].index(False)]
                    raise DataError(f"{table}:{reader.line_num}: no {missing} in this row")
                split = aliases.get(values[2].lower()) if section.split_column else "all"
                if split is None:
                    raise DataError(f"{table}:{reader.line_num}: {unknown('split', values[2], aliases)}")
                rows.append(Row(reader.line_num, values[0] + section.suffix, values[1], split))
    except OSError as error:
        raise DataError(f"{table}: cannot be read: {error.strerror}; set data.root and data.csv.labels") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: not a CSV file in UTF-8: {error}") from error
    if not rows:
        raise DataError(f"{table}: no rows below the header")
    first: dict[str, int] = {}
    for row in rows:
        if row.image in first:
            raise DataError(f"{table}:{row.line}: {row.image!r} is in line {first[row.image]} too; keep one of the two")
        first[row.image] = row.line
    return rows
