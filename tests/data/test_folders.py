"""Folders of images: the accepted layouts, the class order, files left out, and every wrong layout by name."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import ImageFolder

from conftest import draw_split
from tiny import paths_of
from tl_trainer.config.data import DataSection
from tl_trainer.data.dataset import Dataset, Fit
from tl_trainer.data.folders import open_folders, walk
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError
from tl_trainer.predict import expand_inputs

ANIMALS = {"bee": (200, 180, 20), "ant": (60, 30, 10)}  # not in lexicographic order


def _touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def _layout(root: Path, layout: dict[str, str]) -> Path:
    """One empty image per class: {"train": "ant bee"} makes train/ant/0.jpg and train/bee/0.jpg."""
    for split, classes in layout.items():
        _touch(*(root / split / name / "0.jpg" for name in classes.split()))
    return root


def _sizes(dataset: Dataset) -> dict[str, int]:
    return {name: len(split) for name, split in dataset.splits.items()}


def _warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "val", "test"),
        ("Train", "Val", "Test"),
        ("training", "validation", "testing"),
        ("TRAINING", "Valid", "TEST"),
        ("train", "dev", "test"),
    ],
)
def test_split_folders(tmp_path: Path, train: str, val: str, test: str) -> None:
    root = _layout(tmp_path / "root", {train: "ant bee", val: "ant bee"})
    assert _sizes(open_folders(root, None)) == {"train": 2, "val": 2}
    _layout(root, {test: "ant bee"})
    assert list(open_folders(root, None).splits) == ["train", "val", "test"]


READ = "would be read as {} classes"


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        ({"train2014": "ant bee", "val2014": "ant bee"}, f"{READ.format(2)} (train2014, val2014), but train2014, val"),
        ({"train2014": ".", "val2014": "."}, "look like splits; rename them to train, val or test, with a folder for"),
        ({"Train_images": "ant", "test set": "ant", "docs": "."}, "but Train_images, test set look like splits"),
        ({"flowers/Train": "rose", "cars/train": "bus"}, "but cars is a dataset with splits (train); give {}/cars"),
        (
            {"flowers/train": "rose", "flowers/val": "rose"},
            f"{READ.format(1)} (flowers), but flowers is a dataset with",
        ),
        (
            {"ant": "train val", "bee": "train val"},
            "/ant would be read as one class with the images of train, val; put",
        ),
    ],
)
def test_what_looks_like_splits_does_not_become_classes(tmp_path: Path, layout: dict[str, str], complaint: str) -> None:
    root = _layout(tmp_path / "root", layout)
    with pytest.raises(DataError) as caught:
        open_folders(root, None)
    assert complaint.format(root) in str(caught.value)
    assert str(caught.value).startswith(str(root))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "layout",
    [
        {".": "trains valve tester"},
        {".": "train_station test-tube car"},
        {"train station": "indoor outdoor", "car": "."},
        {"ant": "train", "bee": "."},  # a folder of some more images
    ],
)
def test_classes_that_only_sound_like_splits_are_classes(tmp_path: Path, layout: dict[str, str]) -> None:
    root = _layout(tmp_path / "root", layout)
    assert open_folders(root, None).classes == sorted(path.name for path in root.iterdir())


@pytest.mark.parametrize(
    ("layout", "fit", "sizes"),
    [
        ({"test": "ant"}, "fewer", [1, 0]),
        ({"test": "ant bee cow"}, "any", [1, 1]),
        ({"test": "ant cow"}, "any", [1, 0]),
    ],
)
def test_an_evaluation_may_lack_classes_and_leave_others_out(
    tmp_path: Path, layout: dict[str, str], fit: Fit, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    root = _layout(tmp_path / "root", layout)
    (root / "test" / "bee").mkdir(exist_ok=True)  # an empty folder is as good as none
    split = open_folders(root, ["ant", "bee"], fit).split("test")
    assert [list(split.targets).count(label) for label in (0, 1)] == sizes
    left_out = [message for message in _warnings(caplog) if "left out" in message]
    assert left_out == [f"{root / 'test'}: classes that the checkpoint does not have are left out: cow"] * (
        fit == "any"
    )


def test_an_extra_class_of_an_evaluation_is_refused_with_the_flag(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"test": "ant cow"})
    with pytest.raises(DataError, match=r"has the unknown class 'cow'; .* the images of unknown classes out with --ig"):
        open_folders(root, ["ant", "bee"], "fewer")


def test_train_and_test_without_val(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"train": "ant bee", "test": "ant bee"})
    assert _sizes(open_folders(root, None)) == {"train": 2, "test": 2}


def test_flat_class_folders_are_one_split(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {".": "bee ant cow"})
    dataset = open_folders(root, None)
    assert dataset.classes == ["ant", "bee", "cow"]
    assert _sizes(dataset) == {"all": 3}


def test_same_samples_as_imagefolder(tmp_path: Path) -> None:
    """torchvision's ImageFolder is the reference for which file has which label, in which order."""
    root = tmp_path / "root"
    draw_split(root, 3, classes={"b10": (0, 0, 0), "b9": (0, 0, 0), "B7": (0, 0, 0), "_x": (0, 0, 0)})
    _touch(root / "b9" / "deeper" / "still" / "a.PNG", root / "b9" / "deeper" / "b.webp", root / "_x" / "notes.txt")
    reference = ImageFolder(str(root))
    dataset = open_folders(root, None)
    split = dataset.split("all")
    assert dataset.classes == reference.classes
    found = sorted((str(path), label) for path, label in zip(paths_of(split), split.targets, strict=True))
    assert found == sorted(reference.samples)
    assert list(split.targets) == sorted(split.targets)
    assert split.names[-1] == "b9/deeper/still/a.PNG"


def test_images_are_opened_from_their_paths(tmp_path: Path) -> None:
    draw_split(tmp_path / "root", 2, classes=ANIMALS)
    split = open_folders(tmp_path / "root", None).split("all")
    pixel = split.open(1).getpixel((5, 5))
    assert split.names[1] == "ant/01.jpg"
    assert isinstance(pixel, tuple)
    assert torch.allclose(torch.tensor(pixel), torch.tensor([53, 23, 3]), atol=6)


def test_classes_come_from_the_train_folder(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"train": "bee ant", "val": "ant bee"})
    dataset = open_folders(root, None)
    assert dataset.classes == ["ant", "bee"]
    assert list(dataset.split("val").targets) == [0, 1]


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        ({"train": "ant bee cow", "val": "ant cow"}, "val has no class 'bee'; the 3 classes are those of"),
        ({"train": "ant bee", "val": "ant bee cow"}, "val has the unknown class 'cow'; the 2 classes are those of"),
        ({"train": "ant bee", "val": "ant bee", "test": "ant"}, "test has no class 'bee'"),
        ({"train": "ant bee", "val": "Ant bee"}, "val has no class 'ant'"),
        ({"train": "a b c d e f g", "val": "a"}, "'b', 'c', 'd', 'e', 'f' and 1 more"),
    ],
)
def test_a_class_missing_from_or_extra_in_a_split(tmp_path: Path, layout: dict[str, str], complaint: str) -> None:
    root = _layout(tmp_path / "root", layout)
    with pytest.raises(DataError) as caught:
        open_folders(root, None)
    assert complaint in str(caught.value)
    assert str(root) in str(caught.value)


def test_classes_of_a_checkpoint_are_enforced(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {".": "ant bee"})
    assert open_folders(root, ["ant", "bee"]).classes == ["ant", "bee"]
    with pytest.raises(DataError, match="has no class 'cow'; the 3 classes are those of the checkpoint"):
        open_folders(root, ["ant", "bee", "cow"])
    with pytest.raises(DataError, match="has the unknown class 'bee'; the 1 classes are those of the checkpoint"):
        open_folders(root, ["ant"])


def test_the_order_of_a_checkpoint_wins(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {".": "ant bee"})
    dataset = open_folders(root, ["bee", "ant"])
    assert dataset.classes == ["bee", "ant"]
    assert list(zip(dataset.split("all").names, dataset.split("all").targets, strict=True)) == [
        ("bee/0.jpg", 0),
        ("ant/0.jpg", 1),
    ]


def test_a_test_folder_alone_is_enough_with_a_checkpoint(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"test": "ant bee"})
    assert _sizes(open_folders(root, ["ant", "bee"])) == {"test": 2}
    with pytest.raises(DataError, match="has test but no train folder"):
        open_folders(root, None)


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"train": "ant bee", "val": "ant bee"})
    (root / "val" / "bee" / "0.jpg").rename(root / "val" / "bee" / "0.txt")
    with pytest.raises(DataError) as caught:
        open_folders(root, None)
    assert str(caught.value).startswith(f"{root / 'val' / 'bee'}: no images in this class folder")


def test_an_empty_root(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no class folders in it; put the images of each class into a folder"):
        open_folders(tmp_path, None)


@pytest.mark.parametrize("is_file", [False, True])
def test_a_missing_root(tmp_path: Path, is_file: bool) -> None:
    root = tmp_path / "nowhere"
    if is_file:
        root.touch()
    with pytest.raises(DataError) as caught:
        open_dataset(DataSection(root=str(root)))
    assert str(caught.value) == f"{root}: no such folder; set data.root or --data-dir to the folder with your images"
    assert caught.value.exit_code == 2


def test_both_val_and_valid(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"train": "ant", "val": "ant", "valid": "ant"})
    with pytest.raises(DataError, match="has val and valid; keep one of them as its val split"):
        open_folders(root, None)


@pytest.mark.parametrize("name", ["train", "val", "test"])
@pytest.mark.parametrize("classes", [None, True])
def test_a_class_may_be_called_as_a_split(
    tmp_path: Path, name: str, classes: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A folder of images beside others is a class, and that is said."""
    names = sorted(["car", "bus", name])
    root = _layout(tmp_path / "root", {".": " ".join(names)})
    dataset = open_folders(root, names if classes else None)
    assert (dataset.classes, _sizes(dataset)) == (names, {"all": 3})
    assert _warnings(caplog) == [
        f"{root}: {name} is taken as a class beside bus, car, since it has images and no class folders; as a split it "
        "would need a folder for each class"
    ]


@pytest.mark.parametrize(
    ("layout", "complaint"),
    [
        ({"train": "ant bee", "test": ".", ".": "docs"}, "test: no class folders in it"),  # images without labels
        ({".": "train"}, "train: no class folders in it"),
        ({".": "train val"}, "train: no class folders in it"),
        ({".": "train", "car": "sports"}, "train: no class folders in it"),
    ],
)
def test_a_split_without_class_folders_is_named(tmp_path: Path, layout: dict[str, str], complaint: str) -> None:
    root = _layout(tmp_path / "root", layout)
    with pytest.raises(DataError) as caught:
        open_folders(root, None)
    assert str(caught.value).startswith(str(root / complaint.partition(":")[0]))
    assert complaint in str(caught.value)


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    _layout(tmp_path / "pets", {".": "ant bee"})
    assert open_dataset(DataSection(root="~/pets")).classes == ["ant", "bee"]


def test_files_with_another_ending_are_counted_and_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _layout(tmp_path / "root", {"train": "ant bee", "val": "ant bee"})
    _touch(root / "train" / "ant" / "b.heic", root / "val" / "bee" / "LABELS.TXT", root / "val" / "bee" / "readme")
    dataset = open_folders(root, None)
    assert _sizes(dataset) == {"train": 2, "val": 2}
    [warning] = _warnings(caplog)
    assert "3 file(s) left out for their ending (.heic, .txt, no ending), e.g. " in warning
    assert warning.endswith(str(Path("train", "ant", "b.heic")))


def test_nothing_is_said_where_nothing_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _layout(tmp_path / "root", {".": "ant"})
    _touch(*(root / "ant" / f"{ending}{ending}" for ending in (".JPEG", ".Bmp", ".tif", ".pgm")))
    assert _sizes(open_folders(root, None)) == {"all": 5}
    assert not _warnings(caplog)


def test_hidden_folders_are_no_classes(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {"train": "ant bee .git", "val": "ant bee .ipynb_checkpoints"})
    assert open_folders(root, None).classes == ["ant", "bee"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
def test_links_are_followed_but_not_round_a_loop(tmp_path: Path) -> None:
    root = _layout(tmp_path / "root", {".": "ant bee"})
    _touch(tmp_path / "elsewhere" / "far.jpg")
    (root / "ant" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "ant" / "loop").symlink_to(root / "ant")
    (tmp_path / "elsewhere" / "back").symlink_to(root / "ant")
    assert open_folders(root, None).split("all").names == ["ant/0.jpg", "ant/linked/far.jpg", "bee/0.jpg"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need a privilege there")
@pytest.mark.parametrize("backwards", [False, True])
def test_of_two_links_to_a_folder_the_first_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backwards: bool
) -> None:
    """Whatever the order in which the file system lists them."""
    _touch(tmp_path / "elsewhere" / "0.jpg", tmp_path / "ant" / "1.jpg")
    for name in "ab":
        (tmp_path / "ant" / name).symlink_to(tmp_path / "elsewhere")
    real_scandir = os.scandir

    @contextlib.contextmanager
    def ordered_scandir(folder: Path) -> Iterator[list[os.DirEntry[str]]]:
        with real_scandir(folder) as entries:
            yield sorted(entries, key=lambda entry: entry.name, reverse=backwards)

    monkeypatch.setattr(os, "scandir", ordered_scandir)
    assert walk(tmp_path / "ant") == [tmp_path / "ant" / "1.jpg", tmp_path / "ant" / "a" / "0.jpg"]


@pytest.mark.parametrize("closed", ["train/ants", "train/ants/deep", "val"])
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, closed: str) -> None:
    """As root, tests can read any folder."""
    for name in ("train/ants/deep", "train/bees", "val/ants", "val/bees"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.jpg").touch()
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path) == tmp_path / closed:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError) as caught:
        open_folders(tmp_path, None)
    named = f"{tmp_path / closed}: this folder cannot be read (Permission denied); allow it, or move it away"
    assert str(caught.value) == named
    assert str(tmp_path / closed) in [*expand_inputs([str(tmp_path)], io.StringIO())]


def test_files_come_in_the_order_of_their_paths_which_is_not_that_of_their_text(tmp_path: Path) -> None:
    names = ["a/b/2.jpg", "a/b-c/1.jpg", "a/b.jpg", "a/b/\u00e9.JPG", "a/b c/0.png", "z/1.jpg"]
    _touch(*(tmp_path / name for name in names))
    paths = sorted(tmp_path / name for name in names)
    assert walk(tmp_path) == paths
    split = open_folders(tmp_path, None).split("all")
    assert paths_of(split) == paths
    assert split.names == [path.relative_to(tmp_path).as_posix() for path in paths]
    assert paths != [tmp_path / name for name in sorted(names)]


def test_the_real_photographs(photos: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = open_dataset(DataSection(root=str(photos)))
    assert dataset.classes == ["ants", "bees"]
    assert _sizes(dataset) == {"train": 245, "val": 153}
    assert _warnings(caplog) == []


@pytest.mark.parametrize(("name", "source"), [("train-0.tar", "webdataset"), ("train.parquet", "parquet")])
def test_a_folder_of_shards_or_tables_names_their_source(tmp_path: Path, name: str, source: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        open_folders(tmp_path, None)
    assert str(caught.value) == f"{tmp_path}: no class folders in it, but {name}; set data.source={source}"


def test_a_split_is_told_from_a_dataset_by_those_beside_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = _layout(tmp_path / "photos", {"train": "ant bee", "val": "ant bee"})
    open_folders(root, None)
    open_folders(root / "train", ["ant", "bee"])  # as tl-eval does
    assert not caplog.messages
    open_folders(root / "train", None)
    assert caplog.messages == [
        f"{root / 'train'} is one split of {root}, whose val is not used; give {root} to use all"
    ]
