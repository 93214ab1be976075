"""A folder of class folders, with or without split folders around them -> classes and splits."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NoReturn

from tl_trainer.data.dataset import SPLIT_NAMES, SPLIT_OF, Dataset, Files, Fit, Split, enforce_classes
from tl_trainer.data.images import ENDINGS
from tl_trainer.errors import DataError, ImageError
from tl_trainer.ground.machine import cores
from tl_trainer.ground.wording import listed

log = logging.getLogger(__name__)

LOOKED_INTO = 20  # class folders: where one has splits of its own, all have
# train2014, val_images, Test set; not trains, nor value.
_SPLIT_LIKE = re.compile(rf"({'|'.join(sorted(SPLIT_OF, reverse=True))})(?![a-z])", re.IGNORECASE)


def open_folders(root: Path, classes: list[str] | None, fit: Fit = "exact", task: str = "single") -> Dataset:
    """The dataset in a folder. classes: a checkpoint's, which it must have as `fit` says. task: as `data.task`.

    Raises DataError.
    """
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; set data.root or --data-dir to the folder with your images")
    folders = _split_folders(root)
    fixed_by = "the checkpoint" if classes is not None else str(folders.get("train", root))
    if classes is None:
        if "train" not in folders and "all" not in folders:
            raise DataError(f"{root} has {', '.join(folders)} but no train folder")
        classes = _class_names(folders.get("train", root))
        _refuse_splits(folders.get("train", root), classes)
        if "all" in folders:
            _warn_of_splits_beside(Path(os.path.abspath(root)))  # noqa: PTH100  (links stay as they are)
    left_out: list[str] = []
    splits = {}
    for name, folder in folders.items():
        there = _class_names(folder)
        enforce_classes(classes, there, folder, fixed_by, fit)
        if extra := sorted(set(there).difference(classes)):
            log.warning("%s: classes that %s does not have are left out: %s", folder, fixed_by, listed(extra))
        split = _scan(folder, classes, root, left_out, may_lack=fit != "exact")
        splits[name] = split if task == "single" else _merged(split, len(classes))
    if left_out:
        endings = ", ".join(sorted({Path(name).suffix.lower() or "no ending" for name in left_out}))
        log.warning("%s: %d file(s) left out for their ending (%s), e.g. %s", root, len(left_out), endings, left_out[0])
    _warn_of_strays(root, folders)
    return Dataset(classes, splits, str(root))


def _warn_of_strays(root: Path, folders: dict[str, Path]) -> None:
    """Name what looks like a part of the dataset and is not used: images in no class, folders beside the splits."""
    loose = [entry.path for folder in folders.values() for entry in _entries(folder) if _is_image(entry)]
    if loose:
        log.warning("%s: %d image(s) in no class folder are not used, e.g. %s", root, len(loose), loose[0])
    used = {*folders.values()}
    beside = [entry.name for entry in _entries(root) if _is_folder(entry) and Path(entry) not in used]
    if beside and root not in used:
        log.warning("%s: folders beside the splits are not used: %s", root, listed(beside))


def _warn_of_splits_beside(root: Path) -> None:
    """Say that the folder is one split of several, where its name is one and others stand beside it."""
    if root.name.lower() not in SPLIT_OF:  # most often: the folder above may be large, and is left alone
        return
    with contextlib.suppress(DataError):  # a folder above that cannot be read says nothing
        beside = [name for names in _splits_in(root.parent).values() for name in names if name != root.name]
        if beside:
            what = "%s is one split of %s, whose %s is not used; give %s to use all"
            log.warning(what, root, root.parent, listed(beside), root.parent)


def _split_folders(root: Path) -> dict[str, Path]:
    """The split folders under `root`; {"all": root} where there are none and the classes are directly below it.

    A folder with a split's name that holds images and no class folders is a class where others beside it hold images.
    """
    folders = {}
    for split, names in _splits_in(root).items():
        if len(names) > 1:
            raise DataError(f"{root} has {' and '.join(names)}; keep one of them as its {split} split")
        folders[split] = root / names[0]
    flat = [folder.name for folder in folders.values() if not _folders_in(folder) and _has_images(folder)]
    if len(flat) < len(folders) or not folders:
        return folders or {"all": root}
    beside = [name for name in _folders_in(root) if name not in flat and _has_images(root / name)]
    if not beside:
        return folders
    log.warning(
        "%s: %s is taken as a class beside %s, since it has images and no class folders; as a split it would need a "
        "folder for each class",
        *(root, " and ".join(flat), listed(beside)),
    )
    return {"all": root}


def _splits_in(folder: Path) -> dict[str, list[str]]:
    """The folders in it that have the name of a split, by the split, in the order of SPLIT_NAMES."""
    # By name first: of a link only another look says whether it is a folder, and a class may have 100,000 of them.
    names = [entry.name for entry in _entries(folder) if entry.name.lower() in SPLIT_OF and _is_folder(entry)]
    found = {split: [name for name in names if SPLIT_OF[name.lower()] == split] for split in SPLIT_NAMES}
    return {split: present for split, present in found.items() if present}


def _refuse_splits(folder: Path, classes: list[str]) -> None:
    """Raise DataError where what would be taken for classes are splits, or datasets with splits of their own."""
    read = f"{folder} would be read as {len(classes)} classes ({listed(classes)})"
    for name in classes[:LOOKED_INTO]:
        inside = _splits_in(folder / name)
        parts = [part for names in inside.values() for part in names]
        if any(_folders_in(folder / name / part) for part in parts):
            raise DataError(f"{read}, but {name} is a dataset with splits ({listed(parts)}); give {folder / name}")
        if len(inside) > 1:
            raise DataError(
                f"{folder / name} would be read as one class with the images of {listed(parts)}; put the classes into "
                f"the splits, such as {folder / parts[0] / name}"
            )
    like = {name: SPLIT_OF[match[1].lower()] for name in classes if (match := _SPLIT_LIKE.match(name))}
    if len({*like.values()}) > 1 and (len(like) == len(classes) or all(_only_folders(folder / name) for name in like)):
        raise DataError(
            f"{read}, but {listed([*like])} look like splits; rename them to train, val or test, with a folder for "
            "each class in them"
        )


def _only_folders(folder: Path) -> bool:
    return bool(_folders_in(folder)) and not _has_images(folder)


def _folders_in(folder: Path) -> list[str]:
    """The names of the folders in it that are not hidden, sorted."""
    return [entry.name for entry in _entries(folder) if _is_folder(entry) and not entry.name.startswith(".")]


def _refuse(error: OSError) -> NoReturn:
    reason = error.strerror or "unknown reason"
    raise DataError(f"{error.filename}: this folder cannot be read ({reason}); allow it, or move it away") from error


def _entries(folder: str | Path, on_error: Callable[[OSError], object] = _refuse) -> list[os.DirEntry[str]]:
    """What is in it, in the order of the names."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        on_error(error)
        return []


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, which is named as an image that cannot be read
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    return Path(entry.name).suffix.lower() in ENDINGS


def _has_images(folder: Path) -> bool:
    return any(map(_is_image, _entries(folder)))


def _class_names(folder: Path) -> list[str]:
    names = _folders_in(folder)
    if not names:
        for ending, source in ((".tar", "webdataset"), (".parquet", "parquet")):
            if found := sorted(path.name for path in folder.glob(f"*{ending}")):
                raise DataError(f"{folder}: no class folders in it, but {listed(found)}; set data.source={source}")
        if table := next(iter(sorted(folder.glob("*.csv"))), None):
            raise DataError(f"{folder}: no class folders in it, but {table.name}; give the table itself: {table}")
        raise DataError(f"{folder}: no class folders in it; put the images of each class into a folder with its name")
    return names


def _scan(folder: Path, classes: list[str], root: Path, left_out: list[str], *, may_lack: bool) -> Split:
    """All images below the class folders, in sorted order; what has another ending goes into `left_out`."""
    paths: list[str] = []
    names: list[str] = []
    targets: list[int] = []
    for label, name in enumerate(classes):
        before, top = len(paths), str(folder / name)
        inside = (folder / name).relative_to(root).as_posix()
        there = os.path.isdir(top)  # noqa: PTH112  (it may be absent)
        # Text: a Path for each of a million files would take most of the time.
        for path in _walk(top, set()) if there else ():
            relative = inside + path[len(top) :].replace(os.sep, "/")
            if os.path.splitext(path)[1].lower() in ENDINGS:  # noqa: PTH122
                paths.append(path)
                names.append(relative)
                targets.append(label)
            else:
                left_out.append(relative)
        if len(paths) == before and not may_lack:
            raise DataError(f"{folder / name}: no images in this class folder; add some or remove it from every split")
    return Split(Files(paths, names), targets, range(len(paths)))


def _merged(split: Split, classes: int) -> Split:
    """Each content once, called as in the first of its folders, with the labels of all folders that it is in."""
    with ThreadPoolExecutor(cores()) as pool:
        contents = [*pool.map(partial(_content, split), range(len(split)))]
    first: dict[bytes, int] = {}
    labels: dict[int, set[int]] = {}
    for index, (content, target) in enumerate(zip(contents, split.targets, strict=True)):
        labels.setdefault(first.setdefault(content, index), set()).add(target)
    targets = [tuple(int(label in of) for label in range(classes)) for of in labels.values()]
    if all(len(of) == 1 for of in labels.values()):
        log.warning("no image is in two class folders, so each has one label; data.task: single is for such")
    return Split(split.images, targets, [*labels])


def _content(split: Split, index: int) -> bytes:
    """What tells its content from others; of a file that cannot be read its name, until `data.verify` names it."""
    try:
        return hashlib.sha256(split.images.content(index)).digest()
    except ImageError:
        return split.name(index).encode("utf-8", "surrogateescape")


def walk(folder: Path, on_error: Callable[[OSError], object] = _refuse) -> list[Path]:
    """All files below `folder`, in the order of the names at each level, following links but never round a loop.

    on_error: what to do about a folder that cannot be read; DataError where it is not given.
    """
    return [Path(path) for path in _walk(str(folder), set(), on_error)]


def _walk(top: str, seen: set[str], on_error: Callable[[OSError], object] = _refuse) -> Iterator[str]:
    place = os.path.realpath(top)
    if place in seen:  # the order is the same everywhere, so that of two links to a folder the same one counts
        return
    seen.add(place)
    for entry in _entries(top, on_error):
        if _is_folder(entry):
            yield from _walk(entry.path, seen, on_error)
        else:
            yield entry.path
