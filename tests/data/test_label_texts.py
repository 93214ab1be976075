"""Several labels of an image from every source that may have them, and what is wrong with such tables."""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tl_trainer.config.data import CsvSection, DataSection, ParquetSection
from tl_trainer.data.csv_table import open_csv
from tl_trainer.data.dataset import Dataset, Fit
from tl_trainer.data.label_texts import classes_in, images_of_each, is_target
from tl_trainer.data.overview import Overview
from tl_trainer.data.parquet import open_parquet
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError

ROWS = "id,tags,split\na.jpg,cat|dog,train\nb.jpg,,train\nc.jpg, dog | cat ,train\nd.jpg,owl,train\ne.jpg,owl|cat,val\n"
SEPARATED = CsvSection(label_column="tags", split_column="split")
MARKS = "id,cat,dog,split\na.jpg,1,0,train\nb.jpg,,1,train\nc.jpg,0,,val\n"
IN_COLUMNS = CsvSection(label_columns=["dog", "cat"], split_column="split")


def opened(
    folder: Path, text: str, section: CsvSection, classes: list[str] | None = None, fit: Fit = "exact"
) -> Dataset:
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return open_csv(folder, section, classes, fit, "multilabel")


def refused(folder: Path, text: str, section: CsvSection = SEPARATED) -> str:
    with pytest.raises(DataError) as error:
        opened(folder, text, section)
    return str(error.value).replace(f"{folder}/", "")


def test_the_labels_of_a_row_stand_between_separators(tmp_path: Path) -> None:
    dataset = opened(tmp_path, ROWS, SEPARATED)
    assert dataset.classes == ["cat", "dog", "owl"]
    assert dataset.split("train").targets == [(1, 1, 0), (0, 0, 0), (1, 1, 0), (0, 0, 1)]
    assert dataset.split("val").targets == [(1, 0, 1)]
    overview = Overview.of(dataset)
    assert overview.counts == {"train": [2, 2, 1], "val": [1, 0, 1]}
    assert overview.baseline_in_words("val") == "the most frequent label of train, cat, is on 100.0% of the val images"


def test_a_column_for_each_label_may_say_nothing(tmp_path: Path) -> None:
    dataset = opened(tmp_path, MARKS, IN_COLUMNS)
    assert dataset.classes == ["dog", "cat"]
    assert dataset.split("train").targets == [(0, 1), (1, -1)]
    assert dataset.split("val").targets == [(-1, 0)]
    known = opened(tmp_path, MARKS, IN_COLUMNS, ["cat", "owl", "dog"], "fewer")  # nobody says whether there is an owl
    assert known.split("train").targets == [(1, -1, 0), (-1, -1, 1)]


def test_a_wrong_table_is_named_with_its_line(tmp_path: Path) -> None:
    assert refused(tmp_path, ROWS.replace("owl|cat", "owl||cat")) == (
        "labels.csv:6: an empty label in 'owl||cat'; labels are separated by '|', so no name may have it: correct the "
        "row, or set another label_separator"
    )
    assert refused(tmp_path, ROWS.replace("owl|cat", "owl|bat")) == (
        "labels.csv:6: unknown label 'bat'; did you mean 'cat'? (valid: cat, dog, owl), fixed by the train rows"
    )
    assert refused(tmp_path, MARKS.replace("a.jpg,1", "a.jpg,2"), IN_COLUMNS) == (
        "labels.csv:2: cat is '2'; write 1, 0, or nothing where it is not known"
    )
    assert refused(tmp_path, MARKS, CsvSection(label_columns=["dog", "cats"], split_column="split")) == (
        "labels.csv:1: unknown column 'cats'; did you mean 'cat'? (valid: cat, dog, id, split); set "
        "data.csv.label_columns to the right one"
    )
    assert refused(tmp_path, MARKS.replace("b.jpg,,1", "b.jpg,,"), IN_COLUMNS) == (
        "labels.csv: no train image has the label 'dog'; leave its column out of label_columns"
    )
    assert refused(tmp_path, ROWS.replace("a.jpg", "")) == "labels.csv:2: no id in this row"


def test_ignore_extra_leaves_labels_out_and_keeps_the_image(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = opened(tmp_path, ROWS, SEPARATED, ["cat", "dog"], "any")
    assert dataset.split("val").targets == [(1, 0)]
    assert "labels that the checkpoint does not have are left out: owl" in caplog.text
    with pytest.raises(DataError, match=r"csv:5: unknown label 'owl'.*--ignore-extra leaves such labels out"):
        opened(tmp_path, ROWS, SEPARATED, ["cat", "dog"], "fewer")


def test_one_label_in_every_row_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = opened(tmp_path, "id,tags,split\na.jpg,cat,train\nb.jpg,dog,train\n", SEPARATED)
    assert dataset.split("train").targets == [(1, 0), (0, 1)]
    assert "every image has exactly one label; data.task: single makes" in caplog.text


def test_another_separator_than_the_one_that_is_set_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    opened(tmp_path, "id,tags,split\na.jpg,cat;dog,train\nb.jpg,dog;cat,train\nc.jpg,cat,train\n", SEPARATED)
    assert "labels such as 'cat;dog' look like several in one; separate them with label_separator=';'" in caplog.text


@pytest.mark.parametrize("listed", [False, True])
def test_parquet_has_lists_or_texts_or_columns(tmp_path: Path, listed: bool) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    tags = [["cat", "dog"], [], ["dog"], None] if listed else ["cat|dog", "", "dog", None]
    marks = [1, 0, None, 1]
    table = {"image": ["a", "b", "c", "d"], "tags": tags, "cat": marks, "dog": [True, None, False, True]}
    parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    data = DataSection(
        source="parquet", root=str(tmp_path), task="multilabel", parquet=ParquetSection(label_column="tags")
    )
    dataset = open_parquet(data, None)
    assert dataset.classes == ["cat", "dog"]
    assert dataset.split("train").targets == [(1, 1), (0, 0), (0, 1), (0, 0)]
    columns = data.model_copy(update={"parquet": ParquetSection(label_columns=["cat", "dog"])})
    assert open_parquet(columns, None).split("train").targets == [(1, 1), (0, -1), (-1, 0), (1, 1)]


def test_an_image_in_several_folders_has_their_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, colour in (("cat/1", "red"), ("dog/2", "blue"), ("owl/3", "green")):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (20, 20), colour).save(tmp_path / f"{name}.png")
    data = DataSection(root=str(tmp_path), task="multilabel")
    assert open_dataset(data).split("all").targets == [(1, 0, 0), (0, 1, 0), (0, 0, 1)]
    assert "no image is in two class folders" in caplog.text
    shutil.copy(tmp_path / "cat" / "1.png", tmp_path / "dog" / "again.png")
    (tmp_path / "owl" / "link.png").symlink_to(tmp_path / "cat" / "1.png")
    (tmp_path / "owl" / "broken.png").symlink_to(tmp_path / "nothing.png")
    split = open_dataset(data).split("all")
    assert split.names == ["cat/1.png", "dog/2.png", "owl/3.png", "owl/broken.png"]
    assert split.targets == [(1, 1, 1), (0, 1, 0), (0, 0, 1), (0, 0, 1)]


def test_targets_of_both_kinds_are_counted_alike() -> None:
    assert classes_in([0, 2, 2]) == classes_in([(1, 0, -1), (0, 0, 1)]) == {0, 2}
    assert images_of_each([0, 2, 2], 3) == images_of_each([(1, 0, 1), (-1, 0, 1)], 3) == [1, 0, 2]
    assert classes_in([]) == set()
    assert all(is_target(value, 3) for value in (0, 2, (1, 0, -1)))
    assert not any(is_target(value, 3) for value in (3, -1, "cat", (1, 0), (1, 0, 2)))


@pytest.mark.parametrize("source", ["webdataset", "demo", "cifar10"])
def test_other_sources_are_refused(source: str) -> None:
    with pytest.raises(ValueError, match=rf"task multilabel reads imagefolder, csv, parquet, and source is {source}"):
        DataSection(source=source, task="multilabel")


def test_columns_of_labels_are_for_several() -> None:
    with pytest.raises(ValueError, match=re.escape("csv.label_columns is for several labels per image; set data.task")):
        DataSection(source="csv", csv=IN_COLUMNS)


def test_a_table_that_looks_like_several_labels_says_how_to_read_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "labels.csv").write_text("id,label\na,cat|dog\nb,cat\nc,dog\n", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        open_csv(tmp_path, CsvSection(), None)
    assert "data.task=multilabel data.csv.label_separator='|'" in caplog.text
