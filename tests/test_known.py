"""The nearest training images and whether an image is like them, against scikit-learn's neighbours; the file they are
kept in."""

from __future__ import annotations

import csv
import json
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import NearestNeighbors

import tl_trainer
from conftest import Run, draw_split
from tl_trainer import known as module_under_test
from tl_trainer.ground.sealed import load_plain, save_sealed
from tl_trainer.known import FILE, NEAREST, Known

SMALL: dict[str, Any] = {
    "model": {"backbone": "timm/test_resnet", "weights": "none"},
    "transforms": {"train": "eval", "eval": [{"Resize": [32, 32]}], "size": 32},
    "train": {"epochs": 1, "batch_size": 16, "precision": "fp32"},
    "output": {"report": False, "tensorboard": False},
    "data": {"workers": 0},
}

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained classifier of 24 images, and 21 for validation."""
    folder = tmp_path_factory.mktemp("known")
    draw_split(folder / "photos" / "train", 8)
    draw_split(folder / "photos" / "val", 7, size=51)
    places = {"output__dir": str(folder / "runs"), "features__dir": str(folder / "cache")}
    tl_trainer.train(SMALL, data__root=str(folder / "photos"), **places)
    return folder


@pytest.fixture
def best(folder: Path) -> Path:
    """The checkpoint, without a file of features."""
    (folder / "runs" / "run-1" / FILE).unlink(missing_ok=True)
    return folder / "runs" / "run-1" / "best.pth"


def unit(rows: torch.Tensor) -> np.ndarray[Any, Any]:
    return torch.nn.functional.normalize(rows).numpy()


def test_neighbours_are_those_of_scikit_learn(folder: Path, best: Path) -> None:
    model = tl_trainer.load(best)
    train, val = (sorted((folder / "photos" / split).rglob("*.jpg")) for split in ("train", "val"))
    reference = NearestNeighbors(n_neighbors=3, metric="cosine").fit(unit(model.embed(train)))
    distances, _ = reference.kneighbors(unit(model.embed(val)))
    rows = list(model.rows(val, extras=tl_trainer.Extras(neighbours=3)))
    for row, expected in zip(rows, distances, strict=True):
        assert row.neighbours is not None
        assert [1 - one.similarity for one in row.neighbours] == pytest.approx(expected, abs=2e-3)  # float16
        assert all(f"{one.label}/" in one.path for one in row.neighbours)
    itself = next(iter(model.rows([train[5]], extras=tl_trainer.Extras(neighbours=1)))).neighbours
    assert itself is not None
    assert itself[0].similarity == pytest.approx(1, abs=2e-3)
    assert next(iter(model.rows([val[0]]))).neighbours is None


def test_the_file_is_made_once_and_anew_for_another_checkpoint(
    best: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    picture = Image.new("RGB", (40, 40), (200, 40, 30))
    first = list(tl_trainer.load(best).rows([picture], extras=tl_trainer.Extras(neighbours=2)))
    with monkeypatch.context() as patch:
        patch.setattr(module_under_test, "_computed", lambda *_: pytest.fail("computed again"))
        assert (
            list(tl_trainer.load(best, data__root="gone").rows([picture], extras=tl_trainer.Extras(neighbours=2)))
            == first
        )
    assert "holds the features of 24 training images, and data.root changes nothing; remove it" in caplog.text
    monkeypatch.setattr(module_under_test, "seal_of", lambda _: "another")
    assert list(tl_trainer.load(best).rows([picture], extras=tl_trainer.Extras(neighbours=2))) == first
    assert "belongs to an earlier best.pth and is made again" in caplog.text


def test_without_file_and_images_it_says_how_to_get_them(best: Path) -> None:
    with pytest.raises(tl_trainer.InputError, match=r"gone.*\n--neighbours and --reject need .* data\.root=DIR once"):
        tl_trainer.load(best, data__root="gone").rows(["a.jpg"], extras=tl_trainer.Extras(neighbours=1))


def test_no_more_is_kept_than_the_key_allows(best: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = tl_trainer.load(best)
    width = model._parts.features
    model = tl_trainer.load(best, output__neighbours_mb=10 * 2 * width / 1e6)
    assert len(model._known(reject=False).paths) == 10
    assert "output.neighbours_mb holds 10 of the 24 training images, evenly spread" in caplog.text


def test_19_of_20_validation_images_are_accepted_and_what_is_far_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    middle = torch.randn(64, generator=generator)
    train, val, more = (middle + 0.3 * torch.randn(400, 64, generator=generator) for _ in range(3))
    known = Known(torch.nn.functional.normalize(train).half(), ["a"] * 400, [0] * 400, torch.empty(0))
    known = Known(known.features, known.paths, known.targets, known.similarities(val, NEAREST)[0][:, -1])
    far = torch.randn(50, 64, generator=generator)
    accepted = [known.accepted(known.similarities(images, NEAREST + 2)) for images in (val, more, far)]
    assert sum(accepted[0]) == 380
    assert sum(accepted[1]) == pytest.approx(380, abs=16)
    assert not any(accepted[2])


def test_many_images_are_compared_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.nn.functional.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)))
    known = Known(features.half(), ["a"] * 9, [0] * 9, torch.empty(0))
    whole = known.similarities(features, 3)
    monkeypatch.setattr(module_under_test, "ROWS", 2)
    torch.testing.assert_close(known.similarities(features, 3), whole)


@pytest.mark.parametrize(
    "wrong", [[], {"checkpoint": "a"}, {"checkpoint": "a", "features": 1, "paths": [], "targets": [], "val": []}]
)
def test_a_sealed_file_of_other_things_is_refused(best: Path, wrong: Any) -> None:
    save_sealed(best.with_name(FILE), wrong)
    with pytest.raises(tl_trainer.CheckpointError, match=r"neighbours\.pth: not a file of .*features; remove it"):
        tl_trainer.load(best)._known(reject=False)


@pytest.mark.parametrize(
    "forged",
    [
        {"targets": [(1, 0, 0)] * 24}, {"targets": [3] * 24}, {"targets": [-1] * 24}, {"targets": ["red"] * 24},
        {"paths": [b"a"] * 24},
        {"features": torch.zeros(24, 3).half()}, {"val": torch.zeros(21, dtype=torch.int64)},
    ],
)  # fmt: skip
def test_a_forged_file_is_refused(best: Path, forged: dict[str, Any]) -> None:
    model = tl_trainer.load(best)
    model._known(reject=False)
    file = best.with_name(FILE)
    save_sealed(file, {**load_plain(file, mapped=False), **forged})
    with pytest.raises(tl_trainer.CheckpointError, match=r"neighbours\.pth: does not fit .*best\.pth; remove it"):
        model._known(reject=False)


def test_the_rows_of_the_command(folder: Path, best: Path, tl: Run) -> None:
    red = folder / "photos" / "train" / "red" / "03.jpg"
    words = ["predict", red, "gone.jpg", "--checkpoint", best, "--neighbours", 2, "--reject", "--topk", 1]
    row, gone = map(json.loads, tl(*words, "--format", "jsonl").stdout.splitlines())
    assert row["accepted"] is True
    assert [sorted(one) for one in row["neighbours"]] == [["label", "path", "similarity"]] * 2
    assert sorted(gone) == ["error", "path", "predictions"]
    first, second = csv.DictReader(tl(*words, "--format", "csv").stdout.splitlines())
    assert first["accepted"] == "True"
    assert first["neighbour_2"] == row["neighbours"][1]["path"]
    assert float(first["similarity_2"]) == row["neighbours"][1]["similarity"]
    assert (second["neighbour_1"], second["accepted"]) == ("", "")
    text = tl(*words).stdout.splitlines()
    nearest = row["neighbours"][0]
    assert text[1] == f"  similarity {nearest['similarity']:.3f}  {nearest['path']} ({nearest['label']})"
    assert tl(*words, "--tta", "fivecrop").stderr.endswith("take whole images; leave --tta fivecrop out\n")


def test_what_the_run_left_out_is_left_out_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    Path("list.csv").write_text("path,split\ntrain/red/03.jpg,train\nval/blue/01.jpg,val\n")
    settings = {**SMALL, "data": {"workers": 0, "root": str(folder / "photos"), "skip": "list.csv"}}
    best = Path(tl_trainer.train(settings, features__dir=str(folder / "cache"))["checkpoint"])
    Path("list.csv").unlink()  # the run has its own
    known = tl_trainer.load(best, features__dir=str(folder / "cache"))._known(reject=False)
    assert (len(known.paths), "train/red/03.jpg" in known.paths, len(known.val)) == (23, False, 20)
    added = tl_trainer.load(best).add_class("again", folder / "photos" / "train" / "red")
    assert added["solved_on"] == {"old": 23, "new": 8}
    assert "is gone" not in caplog.text
    for name in (FILE, "skip.csv"):
        best.with_name(name).unlink()
    assert len(tl_trainer.load(best)._known(reject=False).paths) == 24
    assert "the run left images out, and they are not left out here: runs/run-1/skip.csv is gone; name" in caplog.text


def test_pictures_of_the_evidence_show_the_nearest_too(
    folder: Path, best: Path, tl: Run, caplog: pytest.LogCaptureFixture
) -> None:
    red = folder / "photos" / "val" / "red" / "00.jpg"
    words = ["predict", red, "--checkpoint", best, "--explain"]
    assert tl(*words, "plain").returncode == tl(*words, "near", "--neighbours", 2).returncode == 0
    (plain,), (near,) = ([*Path(name).iterdir()] for name in ("plain", "near"))
    with Image.open(plain) as alone, Image.open(near) as more:
        assert more.crop((0, 0, *alone.size)).tobytes() == alone.tobytes()
        assert more.height > alone.height + 96
        first = more.getpixel((20, alone.height + 20))
    assert first[0] > 150 > first[1]  # a red one
    gone = tl(*words, "gone", "--neighbours", 2, "data.root=nowhere")
    assert "the pictures show no training images: nowhere: no such folder" in gone.stderr
    assert gone.returncode == 0


def test_sets_and_features_of_the_command(folder: Path, best: Path, tl: Run) -> None:
    paths = sorted((folder / "photos" / "val").rglob("*.jpg"))
    words = ["predict", *paths[:3], "gone.jpg", "--checkpoint", best, "--coverage", 0.9, "--topk", 1]
    rows = [json.loads(line) for line in tl(*words, "--format", "jsonl", "--embed", "a.npz").stdout.splitlines()]
    first = rows[0]["set"]
    assert first[0] == rows[0]["predictions"][0]["label"]
    assert (len({*first}), {*first} - {"blue", "green", "red"}) == (len(first), set())
    assert "set" not in rows[3]
    table = list(csv.DictReader(tl(*words, "--format", "csv").stdout.splitlines()))
    assert [json.loads(row["set"] or "null") for row in table] == [*(row["set"] for row in rows[:3]), None]
    assert tl(*words).stdout.splitlines()[0].endswith("  {" + ", ".join(first) + "}")
    assert tl(*words, "--tta", "flip").stderr.endswith(
        "--coverage was calibrated without --tta; leave --tta flip out\n"
    )
    found = np.load("a.npz")
    assert found["path"].tolist() == [*map(str, paths[:3])]
    np.testing.assert_allclose(found["features"], tl_trainer.load(best).embed(paths[:3]), rtol=1e-4)
    assert tl(*words, "--embed", "a.npz").stderr.endswith("replace it with --force\n")
    measured = tl("eval", best, "--coverage", 0.9, "--split", "val")
    assert "warning: the sets were calibrated on these images" in measured.stderr
    hold = re.search(
        r"^sets for 0\.9: (\S+)% hold the label, (\S+) classes in the mean$", measured.stdout, re.MULTILINE
    )
    assert hold is not None
    assert float(hold[1]) >= 100 * 20 / 21 - 0.05
    assert tl("eval", best, "--coverage", 0.99).stderr.startswith("tl-eval: --coverage 0.99 needs 99 validation images")
