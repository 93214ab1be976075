"""scripts/to_webdataset.py: what was packed is what is read back, and trains to the same head."""

from __future__ import annotations

import csv
import hashlib
import os
import tarfile
from pathlib import Path
from types import ModuleType

import pytest
import torch

from conftest import Run, draw_split, last_json, load_script
from shards import picture
from test_end_to_end import SMALL
from tl_trainer import checkpoint
from tl_trainer.config.data import CsvSection, DataSection
from tl_trainer.data.dataset import Dataset
from tl_trainer.data.sources import open_dataset

SCRIPT = Path(__file__).parents[2] / "scripts" / "to_webdataset.py"

pytestmark = pytest.mark.usefixtures("own_logging", "without_pictures")


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(SCRIPT)


def _opened(root: Path, **section: str | None) -> Dataset:
    keys = {"source": "webdataset", "root": str(root), "webdataset": {"classes": "classes.txt", **section}}
    return open_dataset(DataSection.model_validate(keys))


def _contents(dataset: Dataset) -> dict[str, list[tuple[int, bytes]]]:
    return {
        name: [(split.targets[index], split.images.load(row)[1]) for index, row in enumerate(split.rows)]
        for name, split in dataset.splits.items()
    }


def test_it_is_a_program() -> None:
    assert SCRIPT.read_text().startswith("#!/usr/bin/env python3\n")
    assert os.name == "nt" or os.access(SCRIPT, os.X_OK)


def test_a_folder_comes_back_the_same_and_trains_to_the_same_head(
    script: ModuleType, tl: Run, colours: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert script.main([str(colours), "my shards", "--shard-mb", "0.02"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    rows = [*csv.DictReader((tmp_path / "my shards" / "shards.csv").read_text().splitlines())]
    assert first == f"my shards: 36 samples in {len(rows)} shards"
    assert second == "now run: tl-train 'my shards'"
    assert len(rows) > 4
    for row in rows:
        content = (tmp_path / "my shards" / row["name"]).read_bytes()
        assert (int(row["bytes"]), row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert len(content) <= 32_000
    assert sum(int(row["samples"]) for row in rows if row["name"].startswith("val-")) == 12
    dataset, shards = open_dataset(DataSection(root=str(colours))), _opened(tmp_path / "my shards", val="val-*.tar")
    assert shards.classes == dataset.classes == (tmp_path / "my shards" / "classes.txt").read_text().split()
    assert _contents(shards) == _contents(dataset)
    assert shards.split("val").name(0) == "val-000000.tar/val/blue/00.jpg"
    sources = (colours, "my shards")
    paths = [last_json(tl("train", source, "--epochs", 1, "--json", *SMALL))["checkpoint"] for source in sources]
    heads = [checkpoint.load(Path(path)).trained for path in paths]
    assert heads[0].keys() == heads[1].keys()
    assert all(torch.equal(heads[0][key], heads[1][key]) for key in heads[0])
    figures = [last_json(tl("eval", path, "--json")) for path in paths]
    assert figures[0]["loss"] == figures[1]["loss"]


def test_what_has_no_val_split_and_names_with_dots(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    for number, name in enumerate(["a.b/x.y.png", "a.b/x.png", "a.b/x.JPG", "c/100%.png", "c/ä.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number))
    assert script.main([str(folder), str(tmp_path / "out")]) == 0
    dataset = _opened(tmp_path / "out")
    assert dataset.classes == ["a.b", "c"]
    assert _contents(dataset)["train"] == _contents(open_dataset(DataSection(root=str(folder))))["all"]
    with tarfile.open(tmp_path / "out" / "train-000000.tar") as tar:
        names = tar.getnames()
    assert sorted(names[::2]) == [
        "a.b/x%2Epng.png", "a.b/x%2Ey.png", "a.b/x.jpg", "c/100%25.png", "c/ä.png",
    ]  # fmt: skip
    assert names[1::2] == [f"{name.rpartition('.')[0]}.cls" for name in names[::2]]


def test_a_csv_file_whose_names_have_no_ending(script: ModuleType, tmp_path: Path) -> None:
    for number, name in enumerate(["1", "2"]):
        (tmp_path / name).write_bytes(picture(number))
    (tmp_path / "labels.csv").write_text("id,label\n1,dog\n2,cat\n")
    assert script.main([str(tmp_path / "labels.csv"), str(tmp_path / "out")]) == 0
    dataset = open_dataset(DataSection(source="csv", root=str(tmp_path), csv=CsvSection()))
    assert _contents(_opened(tmp_path / "out"))["train"] == _contents(dataset)["all"]
    assert _opened(tmp_path / "out").split("train").names == ["train-000000.tar/1.png", "train-000000.tar/2.png"]


def test_keys_lead_nowhere_else(script: ModuleType) -> None:
    assert script.key_of("../../a/./b.c") == "%2E%2E/%2E%2E/a/%2E/b%2Ec"
    assert script.key_of("/etc/.x") == "etc/%2Ex"


def test_a_folder_in_use_a_missing_image_and_an_interruption(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_split(tmp_path / "photos", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    assert script.main([str(tmp_path / "photos"), str(tmp_path / "out")]) == 2
    assert "exists and is not an empty folder; remove it or choose another" in capsys.readouterr().err
    (tmp_path / "out" / "mine").unlink()
    monkeypatch.setattr(script, "content_hash", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))
    assert script.main([str(tmp_path / "photos"), str(tmp_path / "out")]) == 1
    monkeypatch.undo()
    (tmp_path / "photos" / "red" / "00.jpg").write_bytes(b"")
    assert script.main([str(tmp_path / "photos"), str(tmp_path / "out")]) == 2
    assert "red/00.jpg: empty file (0 bytes); replace or remove it" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "cache") == ["out", "photos"]
    assert not any((tmp_path / "out").iterdir())
