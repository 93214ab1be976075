"""What is said of a dataset before it is learned: its classes, their images, the sizes, the majority baseline."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tl_trainer.data.dataset import Dataset, Files, Split
from tl_trainer.data.overview import Overview, name_absent


def split(*counts: int, sizes: Sequence[tuple[int, int]] = ()) -> Split:
    targets = [label for label, count in enumerate(counts) for _ in range(count)]
    return Split(Files([], []), targets, range(len(targets)), sizes=sizes)


def test_each_class_is_counted_in_each_split() -> None:
    found = Overview.of(Dataset(["ants", "bees"], {"train": split(123, 121), "val": split(70, 83)}, "photos"))
    assert found.counts == {"train": [123, 121], "val": [70, 83]}
    assert found.baseline("val") == 70 / 153
    assert found.lines() == [
        "images of each class (train/val):",
        "  ants 123/70  bees 121/83",
        "always saying ants would be right for 45.8% of the val images",
    ]


@pytest.mark.parametrize("count", [1, 7, 20])
def test_up_to_twenty_classes_are_shown_in_columns(count: int) -> None:
    names = [f"class {'x' * (index % 9)}{index}" for index in range(count)]
    lines = Overview(names, {"train": [1000] * count, "val": [5] * count}).lines()
    assert all(len(line) <= 80 for line in lines)
    assert sum(line.count("1,000/5") for line in lines) == count


def test_of_more_classes_the_largest_the_median_and_the_smallest_are_shown() -> None:
    names, counts = [f"sort {index}" for index in range(21)], [*range(1, 20), 90, 40]
    found = Overview(names, {"train": counts, "val": [2] * 21})
    assert {names[index]: remark for index, remark in found.shown().items()} == {
        "sort 19": "largest", "sort 10": "median", "sort 0": "smallest",
    }  # fmt: skip
    assert found.lines()[1] == "  largest: sort 19 90/2  median: sort 10  11/2  smallest: sort 0  1/2"


def test_many_classes_with_the_same_number_of_images_are_one_line() -> None:
    found = Overview([f"sort {index}" for index in range(21)], {"train": [1000] * 21, "val": [2] * 21})
    assert found.lines()[0] == "images of each class (train/val): 1,000/2"
    assert len(found.lines()) == 2


def test_a_name_neither_breaks_the_columns_nor_moves_the_cursor() -> None:
    lines = Overview(["y" * 100, "a\x1b"], {"train": [2, 1], "val": [1, 1]}).lines()
    assert lines[1].count("y") == 23
    assert "\x1b" not in "".join(lines)


def test_the_sizes_of_all_splits_are_told_by_their_pixels() -> None:
    train, val = [(640, 480), (10, 900), (640, 480)], [(1000, 1000), (70, 70)]
    dataset = Dataset(["ants"], {"train": split(3, sizes=train), "val": split(2, sizes=val)}, "photos")
    assert Overview.of(dataset).lines()[2] == (
        "image sizes in pixels: 70 x 70 (smallest), 640 x 480 (median), 1000 x 1000 (largest)"
    )
    alike = Dataset(["ants"], {"train": split(2, sizes=[(32, 32)] * 2), "val": split(1, sizes=[(32, 32)])}, "photos")
    assert Overview.of(alike).lines()[2] == "every image has 32 x 32 pixels"


@given(st.lists(st.integers(1, 9), min_size=1))
def test_the_median_is_that_of_numpy(widths: list[int]) -> None:
    sizes = [(width, 1) for width in widths]
    found = Overview.of(Dataset(["ants"], {"train": split(len(sizes), sizes=sizes)}, "photos"))
    expected = np.percentile(widths, [0, 50, 100], method="lower")
    assert [width for width, _ in found.sizes] == expected.tolist()


def test_what_nobody_says_of_a_label_is_not_counted_as_its_absence() -> None:
    targets = [(1, 0), (1, -1), (-1, 1), (0, -1)]
    some = Split(Files([], []), targets, range(len(targets)))
    found = Overview.of(Dataset(["wet", "dark"], {"train": some, "val": some}, "photos"))
    assert found.baseline("val") == 2 / 3
    assert found.lines()[-1] == "the most frequent label of train, wet, is on 66.7% of the val images where it is known"


def test_a_class_without_an_image_is_named(caplog: pytest.LogCaptureFixture) -> None:
    name_absent(["ants", "bees", "wasps"], split(2, 0, 1), "val", "what follows")
    name_absent(["ants", "bees"], split(2, 1), "val", "what follows")
    assert caplog.messages == ["val has no image of 'bees'; what follows"]
