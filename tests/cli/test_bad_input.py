"""Data that is not what a dataset looks like: understood, or refused in one to three lines with the remedy."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from conftest import COLOURS, Run, draw_split
from test_end_to_end import SMALL

pytestmark = pytest.mark.usefixtures("without_pictures", "own_logging")


def _refused(tl: Run, *words: str) -> list[str]:
    done = tl("train", "--dry-run", *SMALL, *words)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert 1 <= len(lines) <= 3
    assert lines[0].startswith("tl-train: ")
    return lines


def _table(name: str, text: bytes) -> str:
    """A CSV file beside the pictures of `colours`, whose names it has."""
    Path("colours", name).write_bytes(text)
    return f"colours/{name}"


def _rows(separator: str, labels: list[str] | None = None) -> str:
    files = sorted(Path("colours").rglob("*.jpg"))
    names = labels or [file.parent.name for file in files]
    lines = [f"{file.relative_to('colours')}{separator}{name}" for file, name in zip(files, names, strict=False)]
    return "\n".join([f"id{separator}label", *lines]) + "\n"


def test_a_folder_without_images(tl: Run) -> None:
    Path("photos").mkdir()
    assert (
        "photos: no class folders in it; put the images of each class into a folder with its name"
        in _refused(tl, "photos")[0]
    )
    Path("photos", "ants").mkdir()
    assert "photos/ants: no images in this class folder; add some or remove it" in _refused(tl, "photos")[0]


def test_one_class(tl: Run) -> None:
    draw_split(Path("photos"), 3, classes={"ants": COLOURS["red"]})
    assert "has one class, 'ants', and a classifier needs two; is the folder one level too" in _refused(tl, "photos")[0]


def test_one_image_of_a_class(tl: Run) -> None:
    draw_split(Path("photos"), 1)
    assert (
        "needs 2 images of each class or more, and there are too few of 'blue' (blue/00.jpg)"
        in _refused(tl, "photos")[0]
    )


def test_one_image(tl: Run) -> None:
    draw_split(Path("photos"), 1, classes={"ants": COLOURS["red"]})
    assert "has one class, 'ants', and a classifier needs two" in _refused(tl, "photos")[0]
    Path("photos", "labels.csv").write_text("id,label\nants/00.jpg,ants\n")
    assert "labels.csv has one class, 'ants', and a classifier needs two" in _refused(tl, "photos/labels.csv")[0]


def test_images_in_no_class_folder(tl: Run) -> None:
    draw_split(Path("photos"), 2)
    for path in sorted(Path("photos").rglob("*.jpg")):
        path.rename(Path("photos", f"{path.parent.name}-{path.name}"))
    for path in Path("photos").iterdir():
        if path.is_dir():
            path.rmdir()
    assert "photos: no class folders in it" in _refused(tl, "photos")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_names_that_are_no_text(tl: Run) -> None:
    draw_split(Path("photos"), 3)
    Path("photos/red/00.jpg").rename(os.fsdecode(b"photos/red/\xff\xfe.jpg"))
    Path("photos/blue").rename(os.fsdecode(b"photos/bl\xfcue"))
    done = tl("train", "photos", "--dry-run", *SMALL)
    assert done.returncode == 0, done.stderr


@pytest.mark.usefixtures("colours")
@pytest.mark.parametrize("separator", [",", ";", "\t"], ids=["commas", "semicolons", "tabs"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "BOM"])
def test_a_table_of_any_kind_is_read(tl: Run, separator: str, mark: bytes) -> None:
    table = _table("labels.csv", mark + _rows(separator).encode())
    done = tl("train", table, "--dry-run", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "3 classes" in done.stderr


@pytest.mark.usefixtures("colours")
def test_a_column_of_numbers(tl: Run) -> None:
    """Few different ones are classes; all different, they are not."""
    few = _table("few.csv", _rows(",", [str(row % 2) for row in range(36)]).encode())
    assert tl("train", few, "--dry-run", *SMALL).returncode == 0
    many = _table("many.csv", _rows(",", [str(row / 7) for row in range(36)]).encode())
    [line] = _refused(tl, many)
    assert "36 different labels in 36 rows, such as 0.0, " in line
    assert line.endswith("is label the column of the classes? set data.csv.label_column")


@pytest.mark.usefixtures("colours")
def test_a_table_in_another_encoding(tl: Run) -> None:
    [line] = _refused(tl, _table("labels.csv", _rows(",").encode("utf-16")))
    assert line.endswith("; save it as CSV in UTF-8")


@pytest.mark.usefixtures("colours")
def test_names_that_have_the_suffix_already(tl: Run) -> None:
    table = _table("labels.csv", _rows(",").encode())
    [line] = _refused(tl, table, "data.csv.suffix=.jpg")
    assert "train/blue/00.jpg.jpg is not there" in line
    assert "set data.csv.suffix= (to nothing), since " in line
    assert tl("train", table, "--dry-run", *SMALL, "data.csv.suffix=.jpg", "data.csv.suffix=").returncode == 0
