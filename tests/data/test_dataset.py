"""The rules that hold for every source: the drawn val split, the class list, splits as sequences."""

from __future__ import annotations

import io
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import draw_split
from tiny import paths_of
from tl_trainer.data.dataset import (
    Dataset,
    Files,
    Pictures,
    Split,
    enforce_classes,
    fingerprint,
    name_hashes,
    with_validation,
)
from tl_trainer.data.folders import open_folders
from tl_trainer.data.images import Decoding
from tl_trainer.errors import DataError, ImageError
from tl_trainer.single_label import SingleLabel


def _files(names: list[str], targets: list[int]) -> Split:
    return Split(Files([Path(name) for name in names], names), targets, range(len(names)))


def _divided(dataset: Dataset, fraction: float = 0.2, seed: int = 0, drawn: list[str] | None = None) -> Dataset:
    def draw(split: Split) -> set[int]:
        return SingleLabel(dataset.classes).hold_out(split.targets, fraction, seed, split.name)

    return with_validation(dataset, draw, None if drawn is None else name_hashes(drawn))


def _dataset(sizes: dict[str, int], split: str = "all") -> Dataset:
    """A dataset without images: `sizes` of them per class."""
    names = [f"{name}/{index}.jpg" for name, size in sizes.items() for index in range(size)]
    targets = [label for label, size in enumerate(sizes.values()) for _ in range(size)]
    return Dataset(list(sizes), {split: _files(names, targets)}, "the pictures")


def _val(dataset: Dataset, fraction: float = 0.2, seed: int = 0) -> list[str]:
    return list(_divided(dataset, fraction, seed).split("val").names)


@pytest.mark.parametrize("split", ["all", "train"])
def test_the_split_divides_the_images(split: str) -> None:
    dataset = _dataset({"a": 10, "b": 20}, split)
    divided = _divided(dataset)
    assert list(divided.splits) == ["train", "val"]
    train, val = divided.split("train"), divided.split("val")
    assert sorted([*train.names, *val.names]) == sorted(dataset.split(split).names)
    for part in (train, val):
        assert isinstance(part.images, Files)
        assert [part.images.paths[row] for row in part.rows] == [Path(name) for name in part.names]
        assert [dataset.classes[label] for label in part.targets] == [name[0] for name in part.names]


@pytest.mark.parametrize("split", ["all", "train"])
def test_the_targets_are_drawn_from_as_they_are_and_once(split: str) -> None:
    """Of what kind they are only the task knows; what it holds out stays in the order of the dataset."""
    targets: list[Any] = [("a", 0.5), None, {"b"}, 3, "c"]
    seen: list[Any] = []

    def draw(split: Split) -> set[int]:
        seen.append(split.targets)
        return {4, 1}

    divided = with_validation(Dataset(["a"], {split: _files(list("vwxyz"), targets)}, ""), draw)
    assert seen == [targets]
    train, val = divided.split("train"), divided.split("val")
    assert (train.names, train.targets) == (["v", "x", "y"], [("a", 0.5), {"b"}, 3])
    assert (val.names, val.targets) == (["w", "z"], [None, "c"])


def test_nothing_is_drawn_where_the_split_is_known() -> None:
    def draw(targets: Sequence[Any]) -> set[int]:
        raise AssertionError("drawn")

    known = with_validation(_dataset({"a": 4}), draw, name_hashes(["a/2.jpg", "a/0.jpg"]))
    assert (known.split("val").names, known.split("train").names) == (["a/0.jpg", "a/2.jpg"], ["a/1.jpg", "a/3.jpg"])
    split = _files(["1"], [0])
    for own in (Dataset(["a"], {"train": split, "val": split}, ""), Dataset(["a"], {"test": split}, "")):
        assert with_validation(own, draw) is own


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(2, 40), min_size=1, max_size=5),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**63 - 1),
)
def test_the_split_is_stratified(sizes: list[int], fraction: float, seed: int) -> None:
    """Each class gives its fraction, but at least one image and never its last."""
    dataset = _dataset({f"class{label}": size for label, size in enumerate(sizes)})
    divided = _divided(dataset, fraction, seed)
    held_out, kept = Counter(divided.split("val").targets), Counter(divided.split("train").targets)
    for label, size in enumerate(sizes):
        assert held_out[label] + kept[label] == size
        assert min(held_out[label], kept[label]) >= 1
        assert abs(held_out[label] - size * fraction) <= 1


def test_the_split_depends_on_the_seed_only() -> None:
    dataset = _dataset({"a": 30, "b": 30})
    assert _val(dataset, seed=7) == _val(dataset, seed=7)
    assert _val(dataset, seed=7) != _val(dataset, seed=8)
    assert sorted(_val(dataset)) != sorted(dataset.split("all").names[:6] + dataset.split("all").names[30:36])


@pytest.mark.parametrize(("size", "file"), [(0, "none"), (1, "b/0.jpg")])
def test_a_class_too_small_to_divide_is_named_with_its_file(size: int, file: str) -> None:
    with pytest.raises(DataError, match=rf"there are too few of 'b' \({file}\); add some, remove the class, or bring"):
        _divided(_dataset({"a": 10, "b": size}), 0.2, 0)


def test_a_split_of_its_own_is_left_alone() -> None:
    split = _files(["1"], [0])
    own = Dataset(["a"], {"train": split, "val": split}, "")
    test_only = Dataset(["a"], {"test": split}, "")
    assert _divided(own, 0.5, 0, ["not/there.jpg"]) is own
    assert _divided(test_only, 0.5, 0, ["not/there.jpg"]) is test_only


def test_the_test_split_is_kept() -> None:
    dataset = _dataset({"a": 5}, "train")
    test = _files(["t"], [0])
    divided = _divided(Dataset(["a"], {**dataset.splits, "test": test}, ""), 0.2, 0)
    assert list(divided.splits) == ["train", "val", "test"]
    assert divided.split("test") is test


def test_a_split_drawn_before_survives_new_files(tmp_path: Path) -> None:
    draw_split(tmp_path, 6, size=4)
    drawn = list(_divided(open_folders(tmp_path, None), 0.3, 3).split("val").names)
    for name in ("blue/003.jpg", "red/00000.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    grown = open_folders(tmp_path, None)
    again = _divided(grown, 0.3, 3, drawn)
    assert list(again.split("val").names) == drawn
    assert {"blue/003.jpg", "red/00000.jpg"} < set(again.split("train").names)
    assert len(again.split("train")) == 6 * 3 + 2 - len(drawn)


def test_a_split_drawn_before_complains_when_files_are_gone(tmp_path: Path) -> None:
    draw_split(tmp_path, 6, size=4)
    drawn = list(_divided(open_folders(tmp_path, None), 0.3, 3).split("val").names)
    for name in drawn[:2]:
        (tmp_path / name).unlink()
    with pytest.raises(DataError) as caught:
        _divided(open_folders(tmp_path, None), 0.3, 3, drawn)
    assert str(caught.value) == (
        f"{tmp_path}: 2 of {len(drawn)} images of the run's val split are gone or have another name; put them back as "
        "the split.csv of the run names them"
    )


def test_no_file_is_copied(tmp_path: Path) -> None:
    draw_split(tmp_path / "root", 5, size=4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    dataset = _divided(open_folders(tmp_path / "root", None), 0.2, 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    splits = dataset.splits.values()
    paths = [path for split in splits for path in paths_of(split)]
    assert len(paths) == 15
    assert set(paths) < set(before)


def test_an_unknown_split_lists_those_there_are() -> None:
    with pytest.raises(DataError, match=r"^the pictures has no split 'test'; it has train, val$"):
        _divided(_dataset({"a": 4}), 0.5, 0).split("test")


@pytest.mark.parametrize(
    ("found", "complaint"),
    [
        (["a", "b"], "here has no class 'c'; the 3 classes are those of train"),
        (["a", "b", "c", "d", "e"], "here has the unknown classes 'd', 'e'; the 3 classes are those of train"),
        (["a", "b", "C"], "here has no class 'c' and has the unknown class 'C'; the 3 classes are those of train"),
        ([], "here has no class 'a', 'b', 'c'; the 3 classes are those of train"),
    ],
)
def test_enforce_classes(found: list[str], complaint: str) -> None:
    with pytest.raises(DataError) as caught:
        enforce_classes(["a", "b", "c"], found, "here", "train")
    assert str(caught.value) == f"{complaint}: add, rename or remove what differs"
    enforce_classes(["a", "b", "c"], ["c", "b", "a"], "here", "train")


def test_a_split_of_pictures_in_memory() -> None:
    """The kind that CIFAR is: a subset of a subset still opens the right picture."""
    pictures = [(Image.new("L", (2, 2), 10 * index), index % 3) for index in range(6)]
    split = Split(Pictures(pictures), [label for _, label in pictures], range(6))
    part = split.subset([5, 3, 1]).subset([2, 0])
    assert (part.names, part.targets, len(part)) == (["1", "5"], [1, 2], 2)
    assert [part.open(index).getpixel((0, 0)) for index in range(2)] == [(10, 10, 10), (50, 50, 50)]


def test_an_image_that_is_not_the_verified_one_is_not_opened(tmp_path: Path) -> None:
    draw_split(tmp_path, 2, size=4)
    split = open_folders(tmp_path, None).split("all")
    contents = [split.images.load(row)[1] for row in split.rows]
    known = replace(split, hashes=contents)
    assert known.contents == [digest.hex()[:16] for digest in contents]
    Image.new("RGB", (4, 4)).save(tmp_path / "green" / "00.jpg")
    part = known.subset([1, 2])
    assert part.open(0).size == split.open(1).size
    with pytest.raises(ImageError, match=r"green/00\.jpg: has changed since it was read first; put it back, or"):
        part.open(1)
    assert split.open(2).size == (4, 4)  # nothing is known of it


def test_the_kinds_of_images_are_alike(tmp_path: Path) -> None:
    draw_split(tmp_path, 1, size=4)
    files = open_folders(tmp_path, None).split("all").images
    held = Pictures([(files.load(index)[0], 0) for index in range(3)])
    for images in (files, held):
        assert len(images) == 3
        picture, digest = images.load(1)
        assert (picture.mode, picture.size, len(digest)) == ("RGB", (4, 4), 32)
        assert images.load(1)[1] == digest != images.load(2)[1]
        assert images.load(1, draft=1)[1] == digest
    stamp = files.stamp(0)
    assert stamp is not None
    assert (stamp.size, stamp.path) == ((tmp_path / files.name(0)).stat().st_size, bytes(tmp_path / files.name(0)))
    (tmp_path / files.name(0)).unlink()
    assert files.stamp(0) is held.stamp(0) is None


def test_a_file_that_changed_is_named_by_its_path(tmp_path: Path) -> None:
    """Even where the dataset calls it something else, so that it can be put back."""
    draw_split(tmp_path, 1, size=4)
    path = tmp_path / "red" / "00.jpg"
    split = Split(Files([path], ["the red one"]), [0], [0])
    known = replace(split, hashes=[split.images.load(0)[1]])
    before = path.read_bytes()
    path.write_bytes(before + b"more")  # it decodes as it did
    with pytest.raises(ImageError) as caught:
        known.open(0)
    assert str(caught.value) == f"{path}: has changed since it was read first; put it back, or start again"
    path.write_bytes(before)
    assert known.open(0).size == (4, 4)
    path.unlink()
    with pytest.raises(ImageError, match=r"red/00\.jpg: cannot be read: "):
        known.open(0)


def test_a_picture_in_memory_that_changed_is_not_opened() -> None:
    pictures = [(Image.new("RGB", (2, 2), colour), 0) for colour in ("red", "blue")]
    split = Split(Pictures(pictures), [0, 0], range(2))
    known = replace(split, hashes=[split.images.load(row)[1] for row in range(2)])
    pictures[1][0].putpixel((0, 0), (0, 0, 254))
    assert known.open(0).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ImageError, match=r"^picture 1: has changed since it was read first"):
        known.open(1)


def test_a_picture_in_memory_is_decoded_as_a_file_is() -> None:
    pictures = Pictures([(Image.new("I;16", (6, 4), 2000), 0)])
    ranged = pictures.decoded(Decoding(value_range=4000.0))
    assert ranged.load(0)[0].getpixel((0, 0)) == (128, 128, 128)
    assert ranged.load(0)[1] != pictures.load(0)[1]
    with pytest.raises(ImageError, match=r"^picture 0: 6 x 4 pixels are too many"):
        pictures.decoded(Decoding(max_megapixels=2e-5)).load(0)


def test_the_content_is_the_file_or_a_png_without_loss(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.write_bytes(b"as it is")
    assert Files([path], ["a"]).content(0) == b"as it is"
    grey = Image.frombytes("I;16", (2, 1), bytes([1, 2, 3, 4]))
    with Image.open(io.BytesIO(Pictures([(grey, 0)]).content(0))) as written:
        assert (written.mode, written.tobytes()) == ("I;16", grey.tobytes())


def test_numbers_in_an_array_stay_in_one() -> None:
    split = replace(_files(list("abc"), [0]), targets=array("q", [5, 6, 7]), rows=array("q", [2, 1, 0]))
    part = split.subset([2, 0])
    assert (part.targets, part.rows) == (array("q", [7, 5]), array("q", [0, 2]))
    assert part.joined(part).rows == [0, 0, 2, 2]


def test_a_path_that_no_system_has_is_said_by_what_reads_it() -> None:
    files = Files([Path("a\0b.jpg")], ["a"])
    assert files.stamp(0) is None
    with pytest.raises(ImageError, match=r"^a\\x00b\.jpg: cannot be read: "):
        files.load(0)


def test_a_subset_takes_what_belongs_to_its_images_along() -> None:
    split = replace(_files(list("abcd"), [3, 2, 1, 0]), hashes=[bytes([index]) * 32 for index in range(4)])
    part = split.subset([3, 0, 3])
    assert (part.names, part.targets, [*part.rows]) == (["d", "a", "d"], [0, 3, 0], [3, 0, 3])
    assert [part.name(index) for index in range(3)] == part.names
    assert part.contents == ["03" * 8, "00" * 8, "03" * 8]
    assert part.subset([1]).hashes == [bytes(32)]
    unread = _files(list("abcd"), [0] * 4)
    assert unread.contents == list(unread.subset([1, 2]).contents) == []
    assert len(split.subset([])) == 0


def test_a_sample_is_spread_over_the_split() -> None:
    split = _files([str(index) for index in range(10)], [0] * 10)
    assert split.sample(4).names == ["0", "2", "5", "7"]
    assert split.sample(99).names == split.names
    assert split.sample(0).names == split.subset([]).sample(5).names == []
    known = replace(split, hashes=[bytes([index]) * 32 for index in range(10)])
    assert known.sample(2).contents == ["00" * 8, "05" * 8]


def test_the_fingerprint_tells_names_labels_contents_and_order() -> None:
    split = replace(_files(["a", "b"], [0, 1]), hashes=[b"1" * 32, b"2" * 32])
    others = [
        split.subset([1, 0]),
        split.subset([0]),
        replace(split, targets=[1, 1]),
        replace(split, hashes=[b"1" * 32, b"3" * 32]),
        replace(split, images=Files([Path("a"), Path("c")], ["a", "c"])),
    ]
    assert len({fingerprint(known) for known in (split, *others)}) == 6
    moved = replace(split, images=Files([Path("x"), Path("y")], ["a", "b"]))
    assert fingerprint(moved) == fingerprint(split.subset([0, 1])) == fingerprint(split)
    assert fingerprint(replace(_files(["\udcff"], [0]), hashes=[bytes(32)]))  # a name that is no text
    with pytest.raises(ValueError, match="zip"):
        fingerprint(_files(["a"], [0]))
