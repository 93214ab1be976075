"""Groups that must not be divided: where they come from, and what is said of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import draw_split
from tl_trainer.config.data import DataSection
from tl_trainer.data.sources import open_dataset
from tl_trainer.errors import DataError, SettingError


def opened(folder: Path, **keys: Any) -> list[str]:
    """The groups of the images, in order."""
    return [*open_dataset(DataSection(root=str(folder), **keys)).split("all").groups]


def test_a_pattern_finds_them_in_the_paths(tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 3)
    assert opened(tmp_path / "photos") == []
    assert opened(tmp_path / "photos", group_pattern="0([0-9])") == ["0", "1", "2"] * 3
    assert opened(tmp_path / "photos", group_pattern="([a-z]+)/(?P<group>..)[.]jpg") == ["00", "01", "02"] * 3
    with pytest.raises(SettingError, match=r"finds no group in 'blue/00\.jpg'; it must find one in the path of every"):
        opened(tmp_path / "photos", group_pattern="0([12])")


def test_a_column_names_them(tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 2)
    rows = [f"{name}/{index:02}.jpg,{name},p{index}" for name in ("blue", "red") for index in range(2)]
    (tmp_path / "photos" / "labels.csv").write_text("\n".join(["id,label,patient", *rows]) + "\n")
    keys: dict[str, Any] = {"source": "csv", "csv": {"group_column": "patient"}}
    assert opened(tmp_path / "photos", **keys) == ["p0", "p1"] * 2
    keys["csv"]["group_column"] = "patients"
    with pytest.raises(DataError, match=r"unknown column 'patients'; did you mean 'patient'\? \(valid: id, label, pat"):
        opened(tmp_path / "photos", **keys)


def test_a_val_split_of_its_own_stays_and_what_it_shares_is_named(
    colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    open_dataset(DataSection(root=str(colours), group_pattern="/0([0-9])"))
    first, second = caplog.messages
    assert first == f"{colours} has a val split of its own, which stays as it is; only folds keep groups together"
    assert second == "4 groups are in train and in val, so the val figures are too good: 0, 1, 2, 3"


def test_what_train_shares_with_test_is_named_where_val_is_drawn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, count in (("train", 3), ("test", 1)):
        draw_split(tmp_path / "photos" / name, count)
    open_dataset(DataSection(root=str(tmp_path / "photos"), group_pattern="/0([0-9])"))
    assert caplog.messages == ["1 groups are in train and in test, so the test figures are too good: 0"]
