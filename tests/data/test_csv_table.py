"""A CSV file of images and labels: splits, classes, and every mistake with the file and the line it is in."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tiny import paths_of
from tl_trainer.config.data import CsvSection, DataSection
from tl_trainer.data import csv_table
from tl_trainer.data.csv_table import open_csv
from tl_trainer.data.dataset import Dataset, Files
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError

ROWS = "id,label\n1.jpg,dog\n2.jpg,cat\n3.jpg,dog\n"
SPLIT_ROWS = "id,label,split\n1.jpg,dog,train\n2.jpg,cat,train\n3.jpg,dog,val\n4.jpg,cat,test\n"


def _open(root: Path, text: str | bytes, classes: list[str] | None = None, **columns: str) -> Dataset:
    (root / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return open_csv(root, CsvSection(**columns), classes)


def _complaint(root: Path, text: str | bytes, **columns: str) -> str:
    """The error's text after the path of the table."""
    with pytest.raises(DataError) as caught:
        _open(root, text, **columns)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{root / 'labels.csv'}:")
    return str(caught.value).removeprefix(f"{root / 'labels.csv'}:")


def test_without_a_split_column(tmp_path: Path) -> None:
    dataset = _open(tmp_path, ROWS)
    split = dataset.split("all")
    assert dataset.classes == ["cat", "dog"]
    assert split.names == ["1.jpg", "2.jpg", "3.jpg"]
    assert list(split.targets) == [1, 0, 1]
    assert paths_of(split) == [tmp_path / name for name in split.names]


@pytest.mark.parametrize("word", ["val", "valid", "validation", "VAL", " Valid "])
def test_with_a_split_column(tmp_path: Path, word: str) -> None:
    dataset = _open(tmp_path, SPLIT_ROWS.replace("val", word), split_column="split")
    assert {name: split.names for name, split in dataset.splits.items()} == {
        "train": ["1.jpg", "2.jpg"],
        "val": ["3.jpg"],
        "test": ["4.jpg"],
    }


def test_through_the_configuration(tmp_path: Path) -> None:
    """The dog-breed kind: other columns, file names without their ending, images in a folder of their own."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (3, 2), (1, 2, 3)).save(tmp_path / "photos" / "a.b.png")
    (tmp_path / "breeds.csv").write_text("breed,weight,name\nbeagle,12,a.b\n")
    section = CsvSection(labels="breeds.csv", images="photos", image_column="name", label_column="breed", suffix=".png")
    dataset = open_dataset(DataSection(source="csv", root=str(tmp_path), csv=section))
    assert dataset.classes == ["beagle"]
    assert dataset.split("all").names == ["a.b.png"]
    assert dataset.split("all").open(0).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf" + ROWS.encode(),
        ROWS.replace("\n", "\r\n").encode(),
        ROWS.rstrip().encode(),
        ROWS.replace("\n", "\n\n").encode(),
        ROWS.replace("dog", '"dog"').encode(),
        ROWS.replace(",dog", ", dog ").encode(),
        ROWS.replace(",", ";").encode(),
        b"\xef\xbb\xbf\r\n" + ROWS.replace(",", "\t").encode(),
    ],
    ids=["BOM", "CRLF", "no newline at the end", "blank lines", "quoted", "spaces", "semicolons", "tabs"],
)
def test_the_same_table_written_otherwise(tmp_path: Path, text: bytes) -> None:
    dataset = _open(tmp_path, text)
    assert dataset.classes == ["cat", "dog"]
    assert list(dataset.split("all").targets) == [1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (["hat|pants", "hat", "pants"], "hat|pants"),
        (["hat pants", "hat", "pants"], "hat pants"),
        (["pants; hat", "hat; shirt", "pants; shirt"], "hat; shirt"),
        (["polar bear", "brown bear", "panda"], None),
        (["red car", "blue car", "red bus", "blue bus"], None),
        (["hound, afghan", "hound, basset", "beagle"], None),
    ],
)
def test_several_labels_in_one_are_named(
    tmp_path: Path, labels: list[str], shown: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    rows = "".join(f'{number}.jpg,"{label}"\n' for number, label in enumerate(2 * labels))
    assert _open(tmp_path, "id,label\n" + rows).classes == sorted(labels)
    assert [f"labels such as {shown!r} look like several labels in one" in line for line in caplog.messages] == [
        True for _ in filter(None, [shown])
    ]


@pytest.mark.parametrize(("distinct", "refused"), [(40, True), (21, True), (20, False)])
def test_a_column_of_numbers_is_no_column_of_classes(tmp_path: Path, distinct: int, refused: bool) -> None:
    text = "id,label\n" + "".join(f"{row}.jpg,{row % distinct / 8}\n" for row in range(40))
    if refused:
        complaint = _complaint(tmp_path, text)
        assert complaint.startswith(f" {distinct} different labels in 40 rows, such as 0.0, 0.125, 0.25")
        assert complaint.endswith("is label the column of the classes? set data.csv.label_column")
    else:
        assert len(_open(tmp_path, text).classes) == distinct


@pytest.mark.parametrize(
    ("ids", "suffix", "remedy"),
    [
        (("1.png", "2.png"), ".png", "1.png.png is not there, nor are others that it names; set data.csv.suffix= (to"),
        (("1", "2"), "", "1 is not there, nor are others that it names; set data.csv.suffix=.png, since"),
        (("1", "2"), ".jpg", "1.jpg is not there, nor are others that it names; set data.csv.suffix=.png, since"),
        (("a/1.png", "a/2.png"), "", "a/1.png is not there, nor are others that it names; set data.csv.images to"),
    ],
)
def test_images_that_are_not_there_name_the_key(tmp_path: Path, ids: tuple[str, str], suffix: str, remedy: str) -> None:
    for name in ("1.png", "2.png"):
        (tmp_path / name).touch()
    (tmp_path / "labels.csv").write_text(f"id,label\n{ids[0]},dog\n{ids[1]},cat\n")
    data = DataSection(source="csv", root=str(tmp_path), csv=CsvSection(suffix=suffix))
    with pytest.raises(DataError) as caught:
        open_dataset(data)
    assert str(caught.value).startswith(f"{tmp_path / 'labels.csv'}: {tmp_path}/{remedy}")


def test_labels_in_any_script_and_with_commas(tmp_path: Path) -> None:
    assert _open(tmp_path, 'id,label\n1.jpg,"hound, afghan"\n2.jpg,柴犬\n').classes == ["hound, afghan", "柴犬"]


@pytest.mark.parametrize(
    ("text", "columns", "complaint"),
    [
        ("id,lable\n1,dog\n", {}, "1: unknown column 'label'; did you mean 'lable'? (valid: id, lable)"),
        ("id,label\n1,dog\n", {"image_column": "file"}, "1: unknown column 'file'"),
        (
            "file,species\n1,dog\n",
            {},
            "1: unknown column 'id' (valid: file, species); set data.csv.image_column and data.csv.label_column to",
        ),
        (ROWS, {"split_column": "Split"}, "1: unknown column 'Split'"),
        ("", {}, " empty file; its first line must name the columns"),
        ("id,label\n1,dog\n2,\n", {}, "3: no label in this row"),
        ("id,label\n1,dog\n2\n", {}, "3: no label in this row"),
        ("id,label\n1,dog\n,cat\n", {}, "3: no id in this row"),
        ("id,label\n1,dog\n2,  \n", {}, "3: no label in this row"),
        ("id,label,split\n1,dog,train\n2,cat,\n", {"split_column": "split"}, "3: no split in this row"),
        ("id,label\n1,dog\n2,hound, afghan\n", {}, "3: more values than the header has columns; put values"),
        (SPLIT_ROWS.replace("3.jpg,dog", "3.jpg,dgo"), {"split_column": "split"}, "4: unknown label 'dgo'; did you"),
        (SPLIT_ROWS.replace("4.jpg,cat", "4.jpg,cow"), {"split_column": "split"}, "5: unknown label 'cow'"),
        (SPLIT_ROWS.replace("val", "vla"), {"split_column": "split"}, "4: unknown split 'vla'; did you mean"),
        (ROWS + "1.jpg,dog\n", {}, "5: '1.jpg' is in line 2 too; keep one of the two"),
        (SPLIT_ROWS + "4.jpg,cat,val\n", {"split_column": "split"}, "6: '4.jpg' is in line 5 too"),
        ('id,label\n1,"a\nb"\n2,\n', {}, "4: no label in this row"),
        ("id,label\n", {}, " no rows below the header"),
        ("id,label,split\n1,dog,val\n", {"split_column": "split"}, " no row is in the train split"),
        (ROWS.encode("utf-16"), {}, " not a CSV file in UTF-8"),
        ("id,label\n1,caf\u00e9\n".encode("latin-1"), {}, " not a CSV file in UTF-8"),
    ],
)  # fmt: skip
def test_mistakes(tmp_path: Path, text: str | bytes, columns: dict[str, str], complaint: str) -> None:
    assert _complaint(tmp_path, text, **columns).startswith(complaint)


def test_an_unknown_label_says_who_fixed_the_classes(tmp_path: Path) -> None:
    text = SPLIT_ROWS.replace("3.jpg,dog", "3.jpg,cow")
    assert _complaint(tmp_path, text, split_column="split").endswith("(valid: cat, dog), fixed by the train rows")


def test_a_missing_column_names_the_remedy(tmp_path: Path) -> None:
    assert _complaint(tmp_path, "image,label\n1,dog\n").endswith("set data.csv.image_column to the right one")


@pytest.mark.parametrize("name", ["nowhere.csv", "."], ids=["missing", "a folder"])
def test_a_table_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError) as caught:
        open_csv(tmp_path, CsvSection(labels=name), None)
    assert str(caught.value).startswith(f"{tmp_path / name}: cannot be read: ")
    assert str(caught.value).endswith("; set data.root and data.csv.labels")


def test_another_split_may_lack_a_class(tmp_path: Path) -> None:
    dataset = _open(tmp_path, "id,label,split\n1,a,train\n2,b,train\n3,b,val\n", split_column="split")
    assert list(dataset.split("val").targets) == [1]


def test_classes_of_a_checkpoint_are_enforced(tmp_path: Path) -> None:
    dataset = _open(tmp_path, ROWS, classes=["ape", "cat", "dog"])
    assert dataset.classes == ["ape", "cat", "dog"]
    assert list(dataset.split("all").targets) == [2, 1, 2]
    with pytest.raises(DataError, match=r"labels\.csv:3: unknown label 'cat'.* fixed by the checkpoint"):
        _open(tmp_path, ROWS, classes=["dog"])


def test_the_test_rows_alone_are_enough_with_a_checkpoint(tmp_path: Path) -> None:
    text = "id,label,split\n1,dog,test\n"
    assert list(_open(tmp_path, text, classes=["cat", "dog"], split_column="split").split("test").targets) == [1]


def test_names_with_one_hash_are_no_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_table, "hash", lambda _: 0, raising=False)
    assert len(_open(tmp_path, ROWS).split("all")) == 3
    assert _complaint(tmp_path, ROWS + "1.jpg,dog\n").startswith("5: '1.jpg' is in line 2 too")


def test_a_path_is_made_when_it_is_asked_for(tmp_path: Path) -> None:
    files = _open(tmp_path, ROWS).split("all").images
    assert isinstance(files, Files)
    assert not isinstance(files.paths, list)
    assert [files.paths[index].name for index in range(3)] == list(files.names)
    assert files.paths[1:] == [files.paths[1], files.paths[2]]


def test_a_column_of_splits_that_is_not_read_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "labels.csv").write_text("id,label,Split\na.jpg,ant,train\nb.jpg,ant,val\n")
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()
    for column, said in ((None, 1), ("Split", 0)):
        caplog.clear()
        open_csv(tmp_path, CsvSection(split_column=column), None)
        assert sum("data.csv.split_column=Split takes the splits from it" in text for text in caplog.messages) == said
