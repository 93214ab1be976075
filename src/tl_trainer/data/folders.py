"""A folder of class folders, with or without split folders around them -> classes and splits."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from tl_trainer.data.dataset import SPLIT_NAMES, Dataset, Files, Split, enforce_classes
from tl_trainer.errors import DataError

log = logging.getLogger(__name__)


def open_folders(root: Path, classes: list[str] | None) -> Dataset:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.root or --data-dir to the folder with your images")
    folders = _split_folders(root)
    fixed_by = "the checkpoint" if classes is not None else str(folders.get("train", root))
    if classes is None:
        if "train" not in folders and "all" not in folders:
            raise DataError(f"{root} has {', '.join(folders)} but no train folder")
        classes = _class_names(folders.get("train", root))
    left_out: list[str] = []
    splits = {}
    for name, folder in folders.items():
        enforce_classes(classes, _class_names(folder), folder, fixed_by)
        splits[name] = _scan(folder, classes, root, left_out)
    if left_out:
        endings = ", ".join(sorted({Path(name).suffix.lower() or "no ending" for name in left_out}))
        log.warning("%s: %d file(s) left out for their ending (%s), e.g. %s", root, len(left_out), endings, left_out[0])
    _warn_of_strays(root, folders)
    return Dataset(classes, splits, str(root))


def _warn_of_strays(root: Path, folders: dict[str, Path]) -> None:
    """Name what looks like a part of the dataset and is not used: images in no class, folders beside the splits."""
    loose = [
        path
        for folder in folders.values()
        for path in sorted(folder.iterdir())
        if path.suffix.lower() in IMG_EXTENSIONS
    ]
    if loose:
        log.warning("%s: %d image(s) in no class folder are not used, e.g. %s", root, len(loose), loose[0])
    used = {*folders.values()}
    beside = [path.name for path in sorted(root.iterdir()) if path.is_dir() and path not in used]
    if beside and root not in used:
        log.warning("%s: not a split and not used: %s", root, ", ".join(beside[:5]))


def _split_folders(root: Path) -> dict[str, Path]:
    """The split folders under `root`; {"all": root} where there are none and the classes are directly below it.

    A folder with a split's name that holds images and no class folders is a class where others beside it hold images.
    """
    folders = {}
    for split, names in SPLIT_NAMES.items():
        present = [root / name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise DataError(
                f"{root} has {' and '.join(path.name for path in present)}; keep one of them as its {split} split"
            )
        if present:
            folders[split] = present[0]
    flat = [folder.name for folder in folders.values() if not _folders_in(folder) and _has_images(folder)]
    if len(flat) < len(folders) or not folders:
        return folders or {"all": root}
    beside = [name for name in _folders_in(root) if name.lower() not in flat and _has_images(root / name)]
    if not beside:
        return folders
    log.warning(
        "%s: %s is taken as a class beside %s, since it has images and no class folders; as a split it would need a "
        "folder for each class",
        *(root, " and ".join(flat), ", ".join(beside[:5])),
    )
    return {"all": root}


def _folders_in(folder: Path) -> list[str]:
    """The names of the folders in it that are not hidden, sorted."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _has_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        return any(Path(entry.name).suffix.lower() in IMG_EXTENSIONS for entry in entries)


def _class_names(folder: Path) -> list[str]:
    names = _folders_in(folder)
    if not names:
        raise DataError(f"{folder}: no class folders in it; put the images of each class into a folder with its name")
    return names


def _scan(folder: Path, classes: list[str], root: Path, left_out: list[str]) -> Split:
    """All images below the class folders, in sorted order; what has another ending goes into `left_out`."""
    paths: list[str] = []
    names: list[str] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        before, top = len(paths), str(folder / name)
        inside = (folder / name).relative_to(root).as_posix()
        for path in _walk(top):  # text: a Path for each of a million files would take longer than all the rest
            relative = inside + path[len(top) :].replace(os.sep, "/")
            if os.path.splitext(path)[1].lower() in IMG_EXTENSIONS:  # noqa: PTH122
                paths.append(path)
                names.append(relative)
                targets.append(label)
            else:
                left_out.append(relative)
        if len(paths) == before:
            raise DataError(f"{folder / name}: no images in this class folder; add some or remove it from every split")
    return Split(Files(paths, names), targets, range(len(paths)))


def walk(folder: Path) -> list[Path]:
    """All files below `folder`, sorted, following links but never round a loop."""
    return [Path(path) for path in _walk(str(folder))]


def _walk(top: str) -> list[str]:
    found: list[str] = []
    seen: set[str] = set()
    for parent, folders, files in os.walk(top, followlinks=True):
        place = os.path.realpath(parent)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders.sort()  # the same order everywhere, so that of two links to a folder the same one counts
        found += [os.path.join(parent, name) for name in files]  # noqa: PTH118
    return sorted(found, key=lambda path: os.path.normcase(path).split(os.sep))  # noqa: PTH206  (the order of Paths)
