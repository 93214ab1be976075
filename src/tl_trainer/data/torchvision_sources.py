"""torchvision's classification datasets, downloaded and checked by torchvision itself -> classes and splits."""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import URLError

from torchvision import datasets

from tl_trainer.data.dataset import Dataset, Files, Pictures, Split, enforce_classes
from tl_trainer.errors import DataError, InputError, SettingError
from tl_trainer.ground.downloads import stall_timeout
from tl_trainer.ground.locks import sole_use
from tl_trainer.ground.wording import unknown

log = logging.getLogger(__name__)

_NAMED = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "flowers102": "Flowers102"}
# What each dataset calls its splits; the first that it knows is taken.
_SPLITS = {"train": ("train", "trainval"), "val": ("val", "valid"), "test": ("test",)}
# The datasets that give one image and one class index, which `torchvision:<Class>` may name.
CLASSES = (
    "CIFAR10", "CIFAR100", "Caltech101", "Caltech256", "Country211", "DTD", "EuroSAT", "FER2013", "FGVCAircraft",
    "FashionMNIST", "Flowers102", "Food101", "GTSRB", "Imagenette", "KMNIST", "MNIST", "OxfordIIITPet", "PCAM",
    "RenderedSST2", "STL10", "SUN397", "SVHN", "StanfordCars", "USPS",
)  # fmt: skip


def open_torchvision(source: str, root: Path, download: bool, classes: list[str] | None) -> Dataset:
    """The official splits of one of torchvision's datasets; one called `all` where it has none.

    Raises SettingError for an unknown class, DataError where the files are missing or damaged.
    """
    name = _NAMED.get(source, source.removeprefix("torchvision:"))
    if name not in CLASSES:
        raise SettingError("data.source", unknown("torchvision dataset", name, CLASSES))
    cls = getattr(datasets, name)
    splits: dict[str, Split] = {}
    found: list[str] | None = None
    for split, arguments in _arguments(cls):
        dataset = _construct(cls, root, download, arguments)
        if dataset is None:
            continue
        splits.setdefault(split, _split(dataset, root))
        found = found or _classes(dataset, splits[split])
    assert found is not None
    if classes is not None:
        enforce_classes(classes, found, f"{name} in {root}", "the checkpoint")
        if classes != found:
            raise DataError(
                f"{name} in {root} has the checkpoint's classes in another order; use the version it came from"
            )
    return Dataset(found, splits, f"{name} in {root}")


def _arguments(cls: type) -> list[tuple[str, dict[str, Any]]]:
    parameters = inspect.signature(cls).parameters
    if "train" in parameters:
        return [("train", {"train": True}), ("test", {"train": False})]
    if "split" in parameters:
        return [(split, {"split": word}) for split, words in _SPLITS.items() for word in words]
    return [("all", {})]


def _construct(cls: type, root: Path, download: bool, arguments: dict[str, Any]) -> Any:
    """The torchvision dataset; None where it has no split of that name."""
    parameters = inspect.signature(cls).parameters
    if "download" in parameters:
        arguments = {**arguments, "download": download}
    if "loader" in parameters:  # a dataset of files: take the path, so that data/images.py opens it, and later
        arguments = {**arguments, "loader": Path}
    try:
        with contextlib.ExitStack() as stack:
            if download and "download" in parameters:  # torchvision writes what it fetches in its final place
                root.mkdir(parents=True, exist_ok=True)
                stack.enter_context(sole_use(root, wait=True))
            stack.enter_context(stall_timeout())
            return cls(root, **arguments)
    except (URLError, HTTPException, ConnectionError) as error:
        raise InputError(
            f"{cls.__name__} cannot be downloaded: {getattr(error, 'reason', None) or error}\n"
            f"Put the files where torchvision expects them below {root}, or set data.root to where they are."
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        if isinstance(error, ValueError) and "split" in arguments and "split" in str(error):
            return None
        reason = str(error).partition(". You can use download=True")[0].rstrip(".")
        remedy = "run again, or put the files there and set data.download: false"
        if not download:
            remedy = "set data.download: true, or set data.root to where the files are"
        raise DataError(f"{cls.__name__} in {root}: {reason}; {remedy}") from error


def _split(dataset: Any, root: Path) -> Split:
    if pairs := _files(dataset):
        paths = [Path(path) for path, _ in pairs]
        files = Files(paths, [_relative(path, root) for path in paths])
        return Split(files, [int(label) for _, label in pairs], range(len(paths)))
    labels: Sequence[Any] = next(
        (getattr(dataset, name) for name in ("targets", "labels", "_labels", "y") if hasattr(dataset, name)), ()
    )
    targets = [int(label) for label in labels] or [int(dataset[index][1]) for index in range(len(dataset))]
    return Split(Pictures(dataset), targets, range(len(dataset)))


def _files(dataset: Any) -> list[tuple[Path | str, int]]:
    """The files of a dataset and their labels, so that data/images.py opens them; none where they are not known."""
    if "loader" in inspect.signature(type(dataset)).parameters:
        return [dataset[index] for index in range(len(dataset))]
    if isinstance(dataset, datasets.GTSRB):
        return list(dataset._samples)
    if isinstance(dataset, datasets.OxfordIIITPet):
        return list(zip(dataset._images, dataset._labels, strict=True))
    return []


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()


def _classes(dataset: Any, split: Split) -> list[str]:
    """The dataset's class names in index order; the numbers where it has none. Of synonyms the first counts."""
    names = getattr(dataset, "classes", None) or getattr(dataset, "categories", None)  # Caltech's word
    if names is None:
        return [str(label) for label in range(max(split.targets) + 1)]
    return [name if isinstance(name, str) else name[0] for name in names]
