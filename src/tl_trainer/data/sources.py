"""The configuration's `data` section -> classes and splits, whatever the source."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from itertools import combinations

from tl_trainer.config.data import DataSection, expand
from tl_trainer.data.csv_table import check_found, open_csv
from tl_trainer.data.dataset import Dataset, Fit, require_same
from tl_trainer.data.demo import demo_folder
from tl_trainer.data.folders import open_folders
from tl_trainer.data.images import STANDARD, Decoding
from tl_trainer.data.parquet import open_parquet
from tl_trainer.data.skip import without
from tl_trainer.data.torchvision_sources import open_torchvision
from tl_trainer.data.webdataset import open_webdataset
from tl_trainer.errors import SettingError
from tl_trainer.ground import distributed
from tl_trainer.ground.wording import listed, printable

log = logging.getLogger(__name__)


def open_dataset(
    data: DataSection, classes: list[str] | None = None, decoding: Decoding = STANDARD, fit: Fit = "exact"
) -> Dataset:
    """The dataset that the configuration's `data` section names; where it has no splits of its own, one called `all`.

    What `data.skip` names is left out. `classes` is a checkpoint's class list, which the dataset must have as `fit`
    says. `decoding` is for its images. Raises DataError, also where ranks find different images, and SettingError for a
    wrong `data.skip`.
    """
    return require_same(distributed.host_by_host(lambda: _prepared(data, classes, decoding, fit)))


def _prepared(data: DataSection, classes: list[str] | None, decoding: Decoding, fit: Fit) -> Dataset:
    dataset = _opened(data, classes, fit)
    if data.skip is not None:
        dataset = without(dataset, expand(data.skip))
    if data.group_pattern is not None:
        dataset = _grouped(dataset, re.compile(data.group_pattern))
    _say_what_is_not_drawn(dataset)
    splits = {name: replace(split, images=split.images.decoded(decoding)) for name, split in dataset.splits.items()}
    return replace(dataset, splits=splits)


def _opened(data: DataSection, classes: list[str] | None, fit: Fit) -> Dataset:
    root = expand(data.root)
    if data.source == "demo":
        return open_folders(demo_folder(), classes, fit)
    if data.source == "imagefolder":
        return open_folders(root, classes, fit, data.task)
    if data.source == "csv":
        dataset = open_csv(root, data.csv, classes, fit, data.task)
        check_found(dataset, data.csv)
        return dataset
    if data.source == "webdataset":
        return open_webdataset(data, classes, fit)
    if data.source == "parquet":
        return open_parquet(data, classes, fit)
    return open_torchvision(data.source, root, data.download, classes)


def _grouped(dataset: Dataset, pattern: re.Pattern[str]) -> Dataset:
    """The dataset with the groups that the pattern finds in its names; SettingError naming the first it does not."""
    number, splits = pattern.groupindex.get("group", 1), {}
    for name, split in dataset.splits.items():
        groups: list[str] = []
        for image in split.names:
            match = pattern.search(image)
            if match is None or match[number] is None:
                what = f"finds no group in {printable(image)!r}; it must find one in the path of every image"
                raise SettingError("data.group_pattern", what)
            groups.append(match[number])
        splits[name] = replace(split, groups=groups)
    return replace(dataset, splits=splits)


def _say_what_is_not_drawn(dataset: Dataset) -> None:
    """Say that splits of the source's own stay as they are, and which groups they share."""
    groups = {name: {*split.groups} for name, split in dataset.splits.items()}
    if groups.get("train") and "val" in groups:
        log.info("%s has a val split of its own, which stays as it is; only folds keep groups together", dataset.where)
    for first, second in combinations(groups, 2):
        if shared := sorted(groups[first] & groups[second]):
            what = (len(shared), first, second, second, listed(shared))
            log.warning("%d groups are in %s and in %s, so the %s figures are too good: %s", *what)


def check_root(data: DataSection) -> None:
    """Raise SettingError where a folder is given to a source that reads none."""
    if data.source == "demo":
        raise SettingError(
            "data.root",
            "--data-dir has no effect on the demo, which draws its own pictures; leave it out, or train on the folder "
            "with data.source=imagefolder",
        )
