"""Parquet tables: bytes, structs and paths, labels and ClassLabels, splits, row groups, every mistake with its row."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from shards import picture
from tl_trainer.config.data import DataSection
from tl_trainer.data import verify
from tl_trainer.data.dataset import Dataset, Files
from tl_trainer.data.sources import open_dataset
from tl_trainer.data.verify import verified
from tl_trainer.errors import DataError, ImageError, SettingError

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

DOG_CAT = {"info": {"features": {"label": {"names": ["dog", "cat"], "_type": "ClassLabel"}}}}


def _write(path: Path, columns: dict[str, Any], group: int = 2, huggingface: object = None, **how: Any) -> Path:
    table = pa.table(columns)
    if huggingface is not None:
        kept = huggingface if isinstance(huggingface, str) else json.dumps(huggingface)
        table = table.replace_schema_metadata({"huggingface": kept})
    pq.write_table(table, path, row_group_size=group, **how)
    return path


def _structs(count: int, first: int = 0) -> Any:
    return [{"bytes": picture(number), "path": f"{number}.png"} for number in range(first, first + count)]


def _opened(root: Path, classes: list[str] | None = None, **section: Any) -> Dataset:
    return open_dataset(
        DataSection.model_validate({"source": "parquet", "root": str(root), "parquet": section}), classes
    )


@pytest.mark.parametrize("kind", ["binary", "large_binary", "struct"])
@pytest.mark.parametrize("how", [{}, {"compression": "none", "use_dictionary": False}], ids=["snappy", "plain"])
def test_bytes_in_any_order_of_any_row_group(tmp_path: Path, kind: str, how: dict[str, Any]) -> None:
    for file, count in enumerate([5, 3, 0, 2]):
        values = _structs(count, 10 * file)
        column = pa.array([value["bytes"] for value in values], getattr(pa, kind)()) if kind != "struct" else pa.array(
            values, pa.struct({"bytes": pa.binary(), "path": pa.string()}))  # fmt: skip
        labels = pa.array([number % 3 for number in range(count)], pa.int64())
        _write(tmp_path / f"{file}.parquet", {"image": column, "label": labels}, **how)
    split = _opened(tmp_path).split("all")
    numbers = [0, 1, 2, 3, 4, 10, 11, 12, 30, 31]
    assert list(split.targets) == [0, 1, 2, 0, 1, 0, 1, 2, 0, 1]
    assert split.names == [f"{n // 10}.parquet/{n % 10}" for n in numbers]
    for index in [9, 0, 5, 4, 8, 1, 7, 2, 6, 3]:
        image, digest = split.images.load(split.rows[index])
        assert image.getpixel((0, 0)) == (numbers[index], 0, 0)
        assert digest == hashlib.sha256(picture(numbers[index])).digest()
    assert pickle.loads(pickle.dumps(split)).images.content(9) == picture(31)  # noqa: S301 (as for a worker)


def test_a_row_group_is_read_once_while_rows_are_read_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.parquet", {"image": _structs(12), "label": ["a", "b"] * 6}, group=4)
    read: list[int] = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_group",
        lambda file, number, **how: read.append(number) or original(file, number, **how),
    )
    monkeypatch.setattr(verify, "cores", lambda: 1)  # of several threads one may fall back by more than a group
    good = verified(_opened(tmp_path).split("all"), "all", DataSection(), None)
    assert read == [0, 1, 2]
    assert [*good.hashes] == [hashlib.sha256(picture(number)).digest() for number in range(12)]


def test_a_file_that_changed_is_not_read_from_memory(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", {"image": _structs(2), "label": ["a", "b"]})
    images = _opened(tmp_path).split("all").images
    before = images.stamp(1)
    digest = images.load(1)[1]
    _write(path, {"image": _structs(2, first=7), "label": ["a", "b"]})
    os.utime(path, (1, 1))
    with pytest.raises(ImageError, match=r"a\.parquet/1: has changed since it was read first"):
        images.load(1, digest)
    assert images.stamp(1) != before
    _write(path, {"image": _structs(1), "label": ["a"]})
    with pytest.raises(ImageError, match=r"a\.parquet: has changed, and has fewer rows; put it back, or start again"):
        images.load(1)
    _write(path, {"other": _structs(2)})
    with pytest.raises(ImageError, match=r"a\.parquet: row group 0 cannot be read: .*; fetch or write it again"):
        images.load(1)
    path.unlink()
    with pytest.raises(ImageError, match=r"a\.parquet: row group 0 cannot be read: .*; fetch or write it again"):
        images.load(1)


def test_paths_are_files_below_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ä").mkdir()
    for number in range(4):
        (tmp_path / "ä" / f"{number}.png").write_bytes(picture(number))
    path = _write(tmp_path / "a.parquet", {"file": [f"ä/{n}.png" for n in range(4)], "label": ["b", "a", "b", "a"]})
    cold = _opened(tmp_path, image_column="file")
    os.utime(path, (1, 1))
    kept, mapped = (_opened(tmp_path, image_column="file") for _ in range(2))
    for dataset in (cold, kept, mapped):
        split = dataset.split("all")
        assert isinstance(split.images, Files)
        assert (dataset.classes, list(split.targets)) == (["a", "b"], [1, 0, 1, 0])
        assert split.names == [f"ä/{number}.png" for number in range(4)]
        assert [split.open(number).getpixel((0, 0)) for number in range(4)] == [(n, 0, 0) for n in range(4)]
    (arrow,) = (tmp_path / "cache" / "listings").iterdir()
    before, used = pa.total_allocated_bytes(), _opened(tmp_path, image_column="file")
    assert pa.total_allocated_bytes() - before < 1000 and len(used.split("all")) == 4
    _write(path, {"file": ["ä/3.png"], "label": ["b"]})
    os.utime(path, (2, 2))
    assert _opened(tmp_path, image_column="file").split("all").names == ["ä/3.png"]
    arrow.write_bytes(b"damaged")
    assert _opened(tmp_path, image_column="file").split("all").names == ["ä/3.png"]


@pytest.mark.parametrize(
    ("labels", "huggingface", "classes", "targets", "said"),
    [
        (pa.array([1, 0]), DOG_CAT, ["dog", "cat"], [1, 0], "labels are numbers of names in the schema of "),
        (
            pa.array([10, 9]),
            None,
            ["9", "10"],
            [1, 0],
            "labels are numbers, which are taken as the names of the classes; a col",
        ),
        (pa.array([1, 0]), {"info": {}}, ["0", "1"], [1, 0], "labels are numbers, which are taken as the names"),
        (pa.array(["b", "a"]).dictionary_encode(), None, ["a", "b"], [1, 0], "labels are names"),
    ],
)
def test_the_class_list(
    tmp_path: Path, labels: Any, huggingface: object, classes: list[str], targets: list[int], said: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level("INFO")
    _write(tmp_path / "a.parquet", {"image": _structs(2), "label": labels}, huggingface=huggingface)
    dataset = _opened(tmp_path)
    assert (dataset.classes, list(dataset.split("all").targets)) == (classes, targets)
    assert caplog.messages[-1].startswith(f"*.parquet: 2 classes; {said}")
    assert "row groups of up to 2" in caplog.messages[0]


def test_splits_by_a_column(tmp_path: Path) -> None:
    columns = {"image": _structs(5), "label": list("abaab"), "part": ["train", "Train", "validation", "test", "dev"]}
    _write(tmp_path / "a.parquet", columns)
    dataset = _opened(tmp_path, split_column="part")
    assert {name: split.names for name, split in dataset.splits.items()} == {
        "train": ["a.parquet/0", "a.parquet/1"],
        "val": ["a.parquet/2", "a.parquet/4"],
        "test": ["a.parquet/3"],
    }


def test_splits_by_the_names_of_the_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"]
    for number, name in enumerate(names):
        _write(tmp_path / f"{name}.parquet", {"image": _structs(2, 2 * number), "label": ["a", "b"]})
    caplog.set_level("INFO")
    dataset = _opened(tmp_path)
    assert {name: len(split) for name, split in dataset.splits.items()} == {"train": 4, "val": 2, "test": 2}
    assert dataset.split("val").open(1).getpixel((0, 0)) == (5, 0, 0)
    assert "*.parquet: the splits are those that the files are called after: test, train, val" in caplog.messages
    _write(tmp_path / "trainer.parquet", {"image": _structs(1), "label": ["a"]})
    with pytest.raises(DataError, match=r"some files are called like splits and trainer\.parquet is not; name all"):
        _opened(tmp_path)
    assert set(_opened(tmp_path, files="train-*.parquet").splits) == {"train"}


MISTAKES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    (
        {"image": [b"x"], "lable": ["a"]},
        {},
        ": unknown column 'label'; did you mean 'lable'? (valid: image, lable); set ",
    ),
    ({"image": [b"x"], "label": ["a"]}, {"split_column": "part"}, ": unknown column 'part' (valid: image, label)"),
    (
        {"image": [1.5], "label": ["a"]},
        {},
        ": the column image holds double, and not bytes, a struct with by",
    ),
    (
        {"image": [b"x"], "label": [1.5]},
        {},
        ": the column label holds double, and not names or whole numbers; ",
    ),
    ({"image": [b"x"], "label": [["a"]]}, {}, ": the column label holds list"),
    ({"image": [b"x", b"y", b"z"], "label": ["a", "b", None]}, {}, "/2: no label in this row"),
    ({"image": [b"x", b"y"], "label": ["a", " "]}, {}, "/1: '' in label is no name on one line; correct it"),
    ({"image": [b"x", b"y"], "label": ["a", "b\nc"]}, {}, "/1: 'b\\nc' in label is no name on one line; correct it"),
    ({"image": ["x", None], "label": ["a", "b"]}, {}, "/1: no image in this row"),
    ({"image": ["x", "y", "x"], "label": ["a", "b", "a"]}, {}, ": x is in two rows of image; keep one of the two"),
    (
        {"image": [b"x"], "label": ["a"], "part": ["trian"]},
        {"split_column": "part"},
        "/0: unknown split 'trian'; di",
    ),
    ({"image": [b"x"], "label": ["a"], "part": ["val"]}, {"split_column": "part"}, "*.parquet: no row is in the train"),
    (
        {"image": [b"x"] * 20, "label": [*range(20)]},
        {},
        "*.parquet: 20 different labels in 20 rows, such as 0, 1, 10 and",
    ),
    ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.string())}, {}, ": no rows in it"),
]


@pytest.mark.parametrize(("columns", "section", "complaint"), MISTAKES)
def test_mistakes(tmp_path: Path, columns: dict[str, Any], section: dict[str, Any], complaint: str) -> None:
    path = _write(tmp_path / "a.parquet", columns)
    with pytest.raises(DataError) as caught:
        _opened(tmp_path, **section)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(complaint if complaint[0] == "*" else f"{path}{complaint}")


@pytest.mark.parametrize("labels", [[0, 2], [0, -1]])
def test_a_number_without_a_name_is_named(tmp_path: Path, labels: list[int]) -> None:
    path = _write(tmp_path / "a.parquet", {"image": _structs(2), "label": labels}, huggingface=DOG_CAT)
    with pytest.raises(DataError) as caught:
        _opened(tmp_path)
    said = (
        f"label {labels[1]} is not one of 0 to 1, the 2 names in the schema of {path}; correct the label, or the names"
    )
    assert str(caught.value) == f"{path}/1: {said}"


def test_the_classes_of_a_checkpoint_are_enforced(tmp_path: Path) -> None:
    _write(tmp_path / "a.parquet", {"image": _structs(2), "label": [1, 0]}, huggingface=DOG_CAT)
    dataset = _opened(tmp_path, ["ape", "cat", "dog"])
    assert list(dataset.split("all").targets) == [1, 2]
    with pytest.raises(DataError, match=r"a\.parquet/0: unknown label 'cat' .*, fixed by the checkpoint"):
        _opened(tmp_path, ["dog"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"<html>404</html>"])
def test_what_is_no_parquet_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.parquet: damaged, or not a Parquet file: "):
        _opened(tmp_path)


@pytest.mark.parametrize("names", [["dog", "dog"], ["dog", 1], ["dog", ["cat"]], ["dog", "c\nat"], "dc", None])
def test_damaged_metadata(tmp_path: Path, names: Any) -> None:
    kept = "{" if names is None else {"info": {"features": {"label": {"names": names}}}}
    _write(tmp_path / "a.parquet", {"image": _structs(2), "label": [0, 1]}, huggingface=kept)
    with pytest.raises(DataError, match=r"a\.parquet: its huggingface metadata is damaged; write the file again"):
        _opened(tmp_path)


def test_two_columns_of_a_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])], ["image", "label", "label"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: 2 columns called label; set data\.parquet\.image_column, "):
        _opened(tmp_path)


def test_damaged_pages(tmp_path: Path) -> None:
    columns = {"image": _structs(2), "label": ["a", "b"]}
    path = _write(tmp_path / "a.parquet", columns)
    data = bytearray(path.read_bytes())
    data[4:60] = b"\xff" * 56
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"a\.parquet: row group 0 cannot be read: .*; fetch or write it again"):
        _opened(tmp_path).split("all").open(0)


def test_a_row_without_an_image_is_a_bad_image(tmp_path: Path) -> None:
    rows = [*_structs(2), {"bytes": None, "path": "x.png"}, {"bytes": b"", "path": None}]
    _write(tmp_path / "a.parquet", {"image": rows, "label": list("abab")})
    skipped: dict[str, str] = {}
    split = _opened(tmp_path).split("all")
    verified(split, "all", DataSection(on_bad_image="skip"), None, skipped=skipped)
    assert skipped == {
        f"a.parquet/{row}": f"{tmp_path}/a.parquet/{row}: no image in this row; replace or remove it" for row in (2, 3)
    }


def test_without_pyarrow_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(SettingError, match=r"^data\.source: parquet needs pyarrow; run: pip install pyarrow$"):
        _opened(tmp_path)


def test_files_of_the_same_name_keep_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        _write(tmp_path / folder / "0.parquet", {"image": _structs(1), "label": ["x"]})
    assert _opened(tmp_path, files="*/0.parquet").split("all").names == [
        f"{tmp_path}/{folder}/0.parquet/0" for folder in "ab"
    ]
