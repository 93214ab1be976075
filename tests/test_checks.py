"""tl-check: faults that are planted into drawn pictures, each found as what it is and in the files that are written."""

from __future__ import annotations

import csv
import json
import logging
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from conftest import Run, last_json
from tl_trainer import api, checks
from tl_trainer.config.load import load
from tl_trainer.errors import DataError

pytestmark = pytest.mark.usefixtures("own_logging")

COUNT = 12  # images of a class in a split
SMALL = {"transforms__size": 64, "train__precision": "fp32", "data__workers": 0}
Row = dict[str, str]


def picture(seed: int, label: str) -> Image.Image:
    """Coarse noise under fine noise, reddish for ants, bluish for bees."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 200, (6, 7, 3), dtype=np.uint8)).resize(
        (140, 120), Image.Resampling.BICUBIC
    )
    fine = rng.integers(0, 20, (120, 140, 3), dtype=np.uint8)
    tint = np.array([1.0, 0.35, 0.2] if label == "ants" else [0.2, 0.35, 1.0])
    return Image.fromarray((np.asarray(coarse) * tint + fine).clip(0, 255).astype(np.uint8))


def draw(root: Path, count: int = COUNT) -> None:
    seed = 0
    for split in ("train", "val"):
        for label in ("ants", "bees"):
            (root / split / label).mkdir(parents=True)
            for index in range(count):
                picture(seed := seed + 1, label).save(root / split / label / f"{index:02}.jpg", quality=92)


def plant(root: Path) -> None:
    ants, bees = root / "train" / "ants", root / "train" / "bees"
    with Image.open(ants / "00.jpg") as first, Image.open(ants / "01.jpg") as second:
        first.resize((90, 77)).save(root / "val" / "ants" / "smaller.jpg", quality=60)
        second.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(ants / "turned.jpg", quality=70)
    picture(901, "bees").filter(ImageFilter.GaussianBlur(6)).save(bees / "blurred.png")
    picture(902, "bees").resize((20, 17)).save(bees / "tiny.png")
    picture(903, "bees").resize((400, 100)).save(bees / "long.png")
    Image.eval(picture(904, "ants"), lambda value: value // 6).save(ants / "dark.png")
    shutil.copy(bees / "03.jpg", ants / "both.jpg")
    Image.new("RGB", (140, 120), "white").save(bees / "blank.png")
    sorry = Image.new("RGB", (140, 120), "white")
    ImageDraw.Draw(sorry).text((30, 50), "image not found", fill="black")
    sorry.save(bees / "sorry.png")
    (bees / "broken.jpg").write_bytes(b"")
    picture(999, "bees").save(ants / "wrong.jpg", quality=92)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the check found in the spoilt pictures."""
    root = tmp_path_factory.mktemp("check")
    draw(root / "photos")
    plant(root / "photos")
    folders = {"features__dir": str(root / "features"), "output__dir": str(root / "runs")}
    return {"root": root, **api.check(root / "photos", **SMALL, **folders)}


def rows(path: str) -> list[Row]:
    with Path(path).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_kind(checked: dict[str, Any], kind: str) -> list[Row]:
    return [row for row in rows(checked["findings"]) if row["kind"] == kind]


@pytest.mark.parametrize(
    ("kind", "path", "label", "reason", "other"),
    [
        ("unreadable", "train/bees/broken.jpg", "", r".*broken\.jpg: empty file \(0 bytes\); replace or remove it", ""),
        ("copy across splits", "train/ants/00.jpg", "ants",
         r"the same picture as val/ants/smaller\.jpg, which is in val", "val/ants/smaller.jpg"),
        ("copy", "train/ants/turned.jpg", "ants", r"the mirror image of train/ants/01\.jpg", "train/ants/01.jpg"),
        ("two labels", "train/ants/both.jpg", "ants",
         r"the same file as train/bees/03\.jpg, which has the label bees", "train/bees/03.jpg"),
        ("two labels", "train/bees/03.jpg", "bees",
         r"the same file as train/ants/both\.jpg, which has the label ants", "train/ants/both.jpg"),
        ("blank", "train/bees/blank.png", "bees", "nearly one colour", ""),
        ("empty", "train/bees/sorry.png", "bees", r"9\d% of its pixels have one shade", ""),
        ("dark", "train/ants/dark.png", "ants", r"its mean brightness is \d% of white", ""),
        ("blurred", "train/bees/blurred.png", "bees", r"blurred: .* deviations less sharp than is usual .*", ""),
        ("tiny", "train/bees/tiny.png", "bees", r"20 x 17 pixels, enlarged more than twice for .* 64 x 64", ""),
        ("long", "train/bees/long.png", "bees", r"4\.0 times as long as wide: .*", ""),
    ],
)  # fmt: skip
def test_each_fault_is_found_as_what_it_is(
    checked: dict[str, Any], kind: str, path: str, label: str, reason: str, other: str
) -> None:
    [row] = [row for row in of_kind(checked, kind) if row["path"] == path]
    assert (row["label"], row["split"], row["other_path"]) == (label, "train", other)
    assert re.fullmatch(reason, row["reason"])


@pytest.mark.parametrize(
    ("kind", "count"),
    [("unreadable", 1), ("copy across splits", 1), ("copy", 1), ("two labels", 2), ("blank", 1), ("empty", 1),
     ("dark", 1), ("tiny", 1), ("long", 1)],
)  # fmt: skip
def test_nothing_else_is_called_so(checked: dict[str, Any], kind: str, count: int) -> None:
    assert len(of_kind(checked, kind)) == count == checked["counts"][kind]


def test_the_wrong_label_is_the_least_believed_beside_what_it_looks_like(checked: dict[str, Any]) -> None:
    first, *_ = of_kind(checked, "label")
    assert first["path"] == "train/ants/wrong.jpg"
    assert re.fullmatch(r"looks like bees \(\d+%\), not ants \(\d+%\), judged without this image", first["reason"])
    assert first["other_label"] == "bees"
    assert "train/ants/wrong.jpg" in [row["path"] for row in of_kind(checked, "outlier")]
    assert checked["wrong_labels"] >= 1


def test_skip_csv_has_what_needs_no_judgement_and_each_image_once(checked: dict[str, Any]) -> None:
    skipped = rows(checked["skip"])
    assert sorted(row["path"] for row in skipped) == [
        "train/ants/00.jpg", "train/ants/both.jpg", "train/ants/turned.jpg", "train/bees/03.jpg",
        "train/bees/blank.png", "train/bees/broken.jpg",
    ]  # fmt: skip
    assert checked["skipped"] == len(skipped)


def test_the_command_that_is_shown_trains_without_them(checked: dict[str, Any], tl: Run) -> None:
    program, *words = shlex.split(checked["train_without"])
    assert program == "tl-train"
    again = tl("check", *words[:-2], f"data.skip={words[-1]}", "--json")
    assert "skip.csv: 6 of 34 train images are left out" in again.stderr
    found = last_json(again)
    assert not {"unreadable", "two labels", "copy", "copy across splits", "blank"} & found["counts"].keys()
    assert [row["path"] for row in rows(found["skip"])] == [row["path"] for row in rows(checked["skip"])]
    assert found["train_without"].endswith(f"--apply {found['skip']}") and "data.skip" not in found["train_without"]


def test_a_second_check_reads_no_image_again(checked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    root = checked["root"]
    monkeypatch.setattr(checks, "look", None)
    folders = {"features__dir": str(root / "features"), "output__dir": "runs"}
    again = api.check(root / "photos", **SMALL, **folders)
    assert again["counts"] == checked["counts"]


def test_nothing_is_changed_and_the_page_shows_the_pairs(checked: dict[str, Any]) -> None:
    page = Path(checked["page"]).read_text(encoding="utf-8")
    for path in ("val/ants/smaller.jpg", "train/ants/both.jpg", "train/ants/wrong.jpg"):
        assert page.count(f'alt="{path}"') >= 1
    assert "http" not in page
    assert shlex.split(checked["train_without"])[-1] in page
    assert json.loads((Path(checked["page"]).parent / "check.json").read_text()) == {
        key: value for key, value in checked.items() if key != "root"
    }
    assert len([*(checked["root"] / "photos").rglob("*.*")]) == 4 * COUNT + 11


# What the command says


def test_the_command_says_what_to_do(tl: Run, tmp_path: Path) -> None:
    draw(tmp_path / "photos", 5)
    shutil.copy("photos/train/ants/00.jpg", "photos/val/ants/again.jpg")
    done = tl("train", "photos", "--check", "transforms.size=64", "train.precision=fp32")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:2] == ["21 images in 2 classes:", "       1  the same picture in two splits"]
    assert lines[-2] == "To train without the row of skip.csv:"
    assert lines[-1].startswith("  tl-train ") and lines[-1].endswith("--apply runs/photos-check-1/skip.csv")
    assert Path("runs/photos-check-1/check.html").is_file()


@pytest.mark.parametrize(
    ("model", "fit"),
    [
        ({"backbone": "resnet50"}, False),
        ({"backbone": "resnet50", "weights": "IMAGENET1K_V1"}, True),
        ({"backbone": "alexnet", "weights": "none"}, False),
        ({"backbone": "alexnet", "trainable": "all"}, True),
    ],
)
def test_features_that_cannot_tell_copies_are_not_used(
    model: dict[str, Any], fit: bool, caplog: pytest.LogCaptureFixture
) -> None:
    train = {"batch_size": 7, "phases": [{"trainable": model.get("trainable", "head")}]}
    with caplog.at_level(logging.INFO):
        config = checks._for_checking(load({"model": model, "transforms": {"size": 64}, "train": train})).config
    assert config.model.backbone == (model["backbone"] if fit else "efficientnet_lite0")
    assert config.transforms.size == (64 if fit else None)
    assert (config.model.trainable, config.train.phases, config.train.batch_size) == ("head", [], 7)
    assert bool(caplog.messages) == (not fit)
    assert all(f"{model['backbone']} (" in line and "efficientnet_lite0 is used" in line for line in caplog.messages)


def test_more_images_than_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "free_memory", lambda: 10**9)
    checks._require_memory(10_000, 1280, 10)
    with pytest.raises(DataError, match=r"checking 1,000,000 images takes about 21 GB of memory, and 1 GB are free"):
        checks._require_memory(1_000_000, 1280, 10)


def test_without_a_cache_nothing_is_kept_and_what_all_images_are_is_a_note(tl: Run, tmp_path: Path) -> None:
    for name in ("ants", "bees", "Test"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(5):
            picture(len(name) * index, name).save(tmp_path / "photos" / name / f"{index}.jpg")
    words = ("transforms.size=256", "features.dir=features", "features.cache=off", "train.precision=fp32")
    notes = last_json(tl("check", "photos", *words, "--json"))["notes"]
    assert notes == [
        "a class has the name of a split (Test); if it is one, put a folder for each class into it",
        "15 of 15 images are tiny: too many to be mistakes, so they are not listed",
    ]
    assert not [*Path("features").glob("*/*.rows")]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to check; give a folder of photographs, a CSV file or a YAML file: tl-check photos/"),
        (["nowhere"], "'nowhere' is no folder and no CSV file here, and not key=value"),
        (["nowhere.yaml"], "--config nowhere.yaml: no such file, and unknown bundled configuration"),
        (["a.yaml", "b.yaml"], "two configurations: a.yaml and b.yaml; give one"),
        (["empty"], "empty: no class folders in it; put the images of each class into a folder with its name"),
        (["one"], "one has one class, 'ants', and a classifier needs two; is the folder one level too high"),
        (["few"], "a val split needs 2 images of each class or more, and there are too few of"),
        (["broken", "data.val_fraction=0.5"], "none of the 2 train images can be used"),
    ],
)
def test_what_cannot_be_checked_is_said_in_a_line(words: list[str], message: str, tl: Run, tmp_path: Path) -> None:
    for folder, names in {"empty": "", "one": "ants", "few": "ants bees", "broken": "ants bees"}.items():
        (tmp_path / folder).mkdir()
        for name in names.split():
            (tmp_path / folder / name).mkdir()
            for index in range(1 if folder == "few" else 2):
                path = tmp_path / folder / name / f"{index}.jpg"
                picture(index, name).save(path) if folder != "broken" else path.write_bytes(b"")
    refused = tl("check", *words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert message in refused.stderr
    assert not Path("runs").exists() or not [*Path("runs").iterdir()]


def test_check_and_resume_exclude_each_other(tl: Run) -> None:
    refused = tl("train", "--check", "--resume")
    assert (refused.returncode, "leave out --resume" in refused.stderr) == (2, True)
