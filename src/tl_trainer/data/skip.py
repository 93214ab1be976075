"""Rows that a run leaves out: a CSV file, such as tl-check's skip.csv, names them; no image file is touched."""

from __future__ import annotations

import csv
import logging
from dataclasses import replace
from pathlib import Path

from tl_trainer.data.dataset import SPLIT_OF, Dataset, Split
from tl_trainer.data.label_texts import classes_in
from tl_trainer.errors import DataError, SettingError
from tl_trainer.ground.wording import printable, unknown

log = logging.getLogger(__name__)

KEY = "data.skip"
PATH, SPLIT = "path", "split"  # the columns that say which image is meant
_SPLITS = {**SPLIT_OF, "all": "all"}


def without(dataset: Dataset, table: Path) -> Dataset:
    """The dataset without the images that `table` names, saying how many these are.

    A row names an image by `path`, and its split by `split` where there is such a column. Raises SettingError for a
    file that is not there or has no such column, DataError where a split or a class to learn from would be left empty.
    """
    rows = named_in(table)
    splits, missing, told = {}, {name for name, _ in rows}, []
    for name, split in dataset.splits.items():
        wanted = {image for image, of in rows if of == "" or _source(of, dataset) == name}
        kept = [index for index in range(len(split)) if split.name(index) not in wanted] if wanted else None
        splits[name] = split if kept is None or len(kept) == len(split) else split.subset(kept)
        if splits[name] is not split:
            missing.difference_update(wanted & {*split.names})
            told.append(f"{len(split) - len(splits[name])} of {len(split)}" + f" {name}" * (name != "all"))
            _require_images(dataset, name, splits[name], table)
    if told:
        log.info("%s: %s images are left out", table, ", ".join(told))
    if missing:
        log.warning(
            "%s: %d of its rows name no image of %s, e.g. %s",
            *(table, len(missing), dataset.where, printable(min(missing))),
        )
    return replace(dataset, splits=splits)


def named_in(table: Path) -> list[tuple[str, str]]:
    """The path and the split of each row; the split is empty where it is not given."""
    try:
        if table.exists() and not table.is_file():
            raise SettingError(KEY, f"{table} is not an ordinary file; give the skip.csv that tl-check wrote, or null")
        with table.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
            reader = csv.DictReader(file)
            if PATH not in (columns := reader.fieldnames or []):
                raise SettingError(KEY, f"{table}:1: {unknown('column', PATH, columns)}; its first line must name it")
            return [_row(row, f"{table}:{reader.line_num}") for row in reader]
    except OSError as error:
        raise SettingError(
            KEY, f"{table}: cannot be read: {error.strerror}; give the skip.csv that tl-check wrote, or null"
        ) from error
    except csv.Error as error:
        raise SettingError(KEY, f"{table}: not a CSV file: {error}") from error


def _row(row: dict[str, str | None], where: str) -> tuple[str, str]:
    path, split = row[PATH], row.get(SPLIT) or ""
    if not path:
        raise SettingError(KEY, f"{where}: the row names no path")
    if split and split.lower() not in _SPLITS:
        raise SettingError(KEY, f"{where}: {unknown('split', split, _SPLITS)}")
    return path, _SPLITS[split.lower()] if split else ""


def _source(split: str, dataset: Dataset) -> str:
    """The split of the dataset that an image is in; one of a val split that was drawn is in train, or in all."""
    return split if split in dataset.splits or split == "test" else "all" if "all" in dataset.splits else "train"


def _require_images(dataset: Dataset, name: str, kept: Split, table: Path) -> None:
    lost = classes_in(dataset.splits[name].targets) - classes_in(kept.targets)
    if lost and (name in ("train", "all") or not len(kept)):
        label = printable(dataset.classes[min(lost)])
        raise DataError(f"{table} leaves no {name} image of the class {label!r}; remove some of its rows")
