"""The configuration's `data` section -> classes and splits, whatever the source."""

from __future__ import annotations

from tl_trainer.config.schema import DataSection, expand
from tl_trainer.data.csv_table import open_csv
from tl_trainer.data.dataset import Dataset
from tl_trainer.data.demo import demo_folder
from tl_trainer.data.folders import open_folders
from tl_trainer.data.torchvision_sources import open_torchvision
from tl_trainer.errors import SettingError


def open_dataset(data: DataSection, classes: list[str] | None = None) -> Dataset:
    """The dataset that the configuration's `data` section names; where it has no splits of its own, one called `all`.

    `classes` is a checkpoint's class list: the dataset must have exactly these. Raises DataError, and SettingError
    for a root where the source has none.
    """
    root = expand(data.root)
    if data.source == "demo":
        if data.root != DataSection().root:
            raise SettingError(
                "data.root",
                "data.source: demo draws its own pictures and reads no folder; leave --data-dir out, or train with "
                "data.source=imagefolder on a folder of your own",
            )
        return open_folders(demo_folder(), classes)
    if data.source == "imagefolder":
        return open_folders(root, classes)
    if data.source == "csv":
        return open_csv(root, data.csv, classes)
    return open_torchvision(data.source, root, data.download, classes)
