"""Copies across splits and under two labels: what is said of them, what is dropped, and when that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Run, draw_split, last_json
from test_end_to_end import SMALL
from tl_trainer.config.data import DataSection
from tl_trainer.data.dataset import Files, Split
from tl_trainer.data.duplicates import REMEDY, unrepeated
from tl_trainer.errors import DataError


def split(name: str, contents: str, targets: list[int]) -> Split:
    """A split whose images have the letters of `contents` as hashes."""
    names = [f"{name}/{index}.jpg" for index in range(len(contents))]
    return Split(
        Files([Path(name) for name in names], names), targets, range(len(names)), [c.encode() for c in contents]
    )


SPLITS = {
    "train": split("train", "aabcdd", [0, 0, 0, 1, 0, 1]),  # d contradicts itself
    "val": split("val", "bxc", [0, 1, 0]),  # c contradicts train
    "test": split("test", "xy", [1, 0]),
}
TOLD = [
    "2 of 6 train images are in val too, 1 of them under another label, e.g. train/3.jpg is val/2.jpg",
    "1 of 3 val images are in test too, e.g. val/1.jpg is test/0.jpg",
    "2 of 6 train images have a copy under another label, e.g. train/4.jpg and train/5.jpg",
]


def test_copies_are_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    kept, told = unrepeated(SPLITS, DataSection())
    assert (kept, told) == (SPLITS, TOLD)
    assert caplog.messages == ["\n".join([*TOLD, REMEDY])]


def test_copies_under_one_label_in_one_split_are_no_mistake(caplog: pytest.LogCaptureFixture) -> None:
    splits = {"train": split("train", "aab", [0, 0, 1]), "val": split("val", "c", [0])}
    for policy in ("warn", "error", "drop"):
        assert unrepeated(splits, DataSection(on_duplicates=policy)) == (splits, [])
    assert not caplog.messages


def test_copies_are_an_error_where_that_is_configured() -> None:
    with pytest.raises(DataError) as caught:
        unrepeated(SPLITS, DataSection(on_duplicates="error"))
    assert str(caught.value).splitlines() == [*TOLD, REMEDY]


def test_train_loses_what_other_splits_have_and_any_split_what_contradicts_itself() -> None:
    splits = {
        **SPLITS,
        "train": split("train", "aabcddz", [0, 0, 0, 1, 0, 1, 1]),
        "val": split("val", "bxcqq", [0, 1, 0, 0, 1]),
    }
    kept, told = unrepeated(splits, DataSection(on_duplicates="drop"))
    assert {name: kept[name].names for name in kept} == {
        "train": ["train/0.jpg", "train/1.jpg", "train/6.jpg"],
        "val": ["val/0.jpg", "val/1.jpg", "val/2.jpg"],
        "test": ["test/0.jpg", "test/1.jpg"],
    }
    assert kept["train"].hashes == [b"a", b"a", b"z"]
    assert told[-2:] == [
        "4 of 7 train images were left out (data.on_duplicates: drop)",
        "2 of 5 val images were left out (data.on_duplicates: drop)",
    ]


@pytest.mark.parametrize("lost", ["train", "val"])
def test_dropping_all_of_a_class_is_refused(lost: str) -> None:
    train, val = split("train", "abc", [0, 0, 1]), split("val", "xx", [0, 1])
    splits = {"train": train, "val": split("val", "c", [1])} if lost == "train" else {"train": train, "val": val}
    with pytest.raises(DataError, match=f"without copies, no {lost} image of [12] classes would be left"):
        unrepeated(splits, DataSection(on_duplicates="drop"))


def test_a_run_says_so_in_its_log_and_in_its_report(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "data" / "train", 4)
    draw_split(tmp_path / "data" / "val", 2, size=50)
    shutil.copy(tmp_path / "data" / "train" / "red" / "00.jpg", tmp_path / "data" / "val" / "blue" / "copy.jpg")
    words = ("train", "--data-dir", tmp_path / "data", "--epochs", 1, *SMALL, "output.tensorboard=false")
    sentence = "1 of 12 train images are in val too, 1 of them under another label, e.g. "
    done = tl(*words, "output.report=true", "--json")
    assert f"warning: {sentence}" in done.stderr
    page = Path(last_json(done)["report"]).read_text(encoding="utf-8")
    assert sentence in page
    refused = tl(*words, "data.on_duplicates=error")
    assert refused.returncode == 2
    assert f"tl-train: {sentence}" in refused.stderr
    dropped = tl(*words, "data.on_duplicates=drop", "--json")
    assert "11 train, 7 val images in 3 classes" in dropped.stderr
    found = tl("eval", "--checkpoint", last_json(dropped)["checkpoint"], "--json")
    assert json.loads(found.stdout)["n"] == 7
    assert (
        last_json(tl("train", "--resume", json.loads(dropped.stdout)["run_dir"], "--epochs", 2, "--json"))["epochs"]
        == 2
    )
