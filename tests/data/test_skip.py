"""data.skip: which rows are left out of which split, what is said of it, and every wrong table by name."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import Run, draw_split, last_json
from test_end_to_end import SMALL
from tl_trainer.config.data import DataSection
from tl_trainer.data.dataset import Dataset, Pictures, Split
from tl_trainer.data.skip import without
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError, SettingError

pytestmark = pytest.mark.usefixtures("own_logging")


def table(text: str) -> Path:
    Path("skip.csv").write_text(text, encoding="utf-8", errors="surrogateescape")
    return Path("skip.csv")


def pictures(*splits: str, count: int = 4) -> Dataset:
    """A dataset of pictures that are called by number in each split."""
    images = Pictures([(Image.new("RGB", (4, 4)), 0)] * count)
    return Dataset(
        ["a", "b"], {name: Split(images, [0, 1] * (count // 2), range(count)) for name in splits}, "pictures"
    )


def names(dataset: Dataset) -> dict[str, list[str]]:
    return {name: split.names for name, split in dataset.splits.items()}


def test_the_key_leaves_rows_out_and_says_how_many(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "val"):
        draw_split(tmp_path / "photos" / name, 3)
    skip = table("path,reason\ntrain/red/01.jpg,copy\nval/blue/02.jpg,copy\nval/blue/00.jpg,dark\n")
    whole = names(open_dataset(DataSection(root="photos")))
    with caplog.at_level(logging.INFO):
        kept = names(open_dataset(DataSection(root="photos", skip=str(skip))))
    assert [*{*whole["train"]} - {*kept["train"]}] == ["train/red/01.jpg"]
    assert {*whole["val"]} - {*kept["val"]} == {"val/blue/00.jpg", "val/blue/02.jpg"}
    assert caplog.messages == ["skip.csv: 1 of 9 train, 2 of 9 val images are left out"]


@pytest.mark.parametrize(
    ("splits", "row", "left_out"),
    [
        (("train", "test"), "1,test", {"test"}),
        (("train", "test"), "1,Test", {"test"}),
        (("train", "test"), "1,train", {"train"}),
        (("train",), "1,test", set()),
        (("train", "test"), "1,val", {"train"}),  # a drawn one
        (("all",), "1,val", {"all"}),
        (("all",), "1,train", {"all"}),
        (("train", "test"), "1,", {"train", "test"}),
    ],
)
def test_the_split_says_which_image_of_that_name_is_meant(
    splits: tuple[str, ...], row: str, left_out: set[str]
) -> None:
    kept = names(without(pictures(*splits), table(f"path,split\n{row}\n")))
    assert {name for name in splits if kept[name] == ["0", "2", "3"]} == left_out
    assert {name for name in splits if kept[name] == ["0", "1", "2", "3"]} == {*splits} - left_out


def test_rows_that_name_no_image_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    before = pictures("train")
    after = without(before, table("path\n7\n8\n"))
    assert after.splits == before.splits
    assert caplog.messages == ["skip.csv: 2 of its rows name no image of pictures, e.g. 7"]


def test_a_name_that_is_no_text_is_found() -> None:
    class Odd(Pictures):
        def name(self, index: int) -> str:
            return f"\udcff{index}"

    split = Split(Odd([(Image.new("RGB", (4, 4)), 0)] * 4), [0, 1, 0, 1], range(4))
    kept = without(Dataset(["a", "b"], {"train": split}, "odd"), table("path\n\udcff1\n"))
    assert [*kept.splits["train"].rows] == [0, 2, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,split\na,b\n", r"data\.skip: skip\.csv:1: unknown column 'path' \(valid: file, split\)"),
        ("", r"data\.skip: skip\.csv:1: unknown column 'path'"),
        ("path\n" + "x" * 200_000, r"data\.skip: skip\.csv: not a CSV file: field larger"),
        ("split,path\ntrain,1\ntest\n", r"data\.skip: skip\.csv:3: the row names no path"),
        ("path,split\n1,tset\n", r"data\.skip: skip\.csv:2: unknown split 'tset'"),
        (None, r"data\.skip: skip\.csv: cannot be read: No such file .*; give the skip\.csv that tl-check wrote"),
    ],
)
def test_a_wrong_table_is_refused(text: str | None, message: str) -> None:
    path = Path("skip.csv") if text is None else table(text)
    with pytest.raises(SettingError, match=message):
        without(pictures("train"), path)


def test_what_is_no_ordinary_file_is_not_opened() -> None:
    with pytest.raises(SettingError, match=r"data\.skip: /dev/zero is not an ordinary file"):
        without(pictures("train"), Path("/dev/zero"))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,train\n3,train\n", r"skip\.csv leaves no train image of the class 'b'; remove some of its rows"),
        ("0,test\n1,test\n2,test\n3,test\n", r"skip\.csv leaves no test image of the class 'a'"),
    ],
)
def test_nothing_is_left_empty(rows: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        without(pictures("train", "test"), table(f"path,split\n{rows}"))


def test_a_split_to_judge_by_may_lose_a_class() -> None:
    assert len(without(pictures("train", "test"), table("path,split\n1,test\n3,test\n")).split("test")) == 2


def test_a_run_leaves_them_out_and_so_does_its_evaluation(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 4)
    skip = table("path,split\nred/00.jpg,train\nblue/01.jpg,val\n")
    ran = tl("train", "photos", "--apply", skip, "--epochs", 1, "--json", *SMALL)
    result: dict[str, Any] = last_json(ran)
    assert "skip.csv: 2 of 12 images are left out" in ran.stderr
    rows = (Path(result["run_dir"]) / "split.csv").read_text(encoding="utf-8")
    assert rows.count("\n") == 11
    assert "red/00.jpg" not in rows and "blue/01.jpg" not in rows
    evaluated = tl("eval", "--checkpoint", result["checkpoint"], "--json")
    assert last_json(evaluated)["n"] == result["val"]["n"]
    skip.unlink()
    gone = tl("eval", "--checkpoint", result["checkpoint"], "--json")
    assert last_json(gone)["n"] == 3
    assert "leave them out too" not in gone.stderr  # of the val split, which was drawn without them
    trained_on = tl("eval", "--checkpoint", result["checkpoint"], "--split", "train")
    assert "leave them out too: data.skip=skip.csv" in trained_on.stderr
    named = tl("eval", "--checkpoint", result["checkpoint"], "data.skip=skip.csv")
    assert (named.returncode, "data.skip: skip.csv: cannot be read" in named.stderr) == (2, True)
    shutil.copytree("photos", "others")
    others = tl("eval", "--checkpoint", result["checkpoint"], "--data-dir", "others")
    assert (others.returncode, "left out" in others.stderr) == (0, False)


def test_a_wrong_table_is_named_with_its_key_before_an_image_is_read(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 2)
    (tmp_path / "photos" / "red" / "00.jpg").write_bytes(b"")
    refused = tl("train", "photos", "--apply", "nowhere.csv")
    assert refused.returncode == 2
    assert refused.stderr.startswith("tl-train: the command line: data.skip: nowhere.csv: cannot be read: No such file")
