"""A class that is added: the head against scikit-learn's with the class, the run that is written, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression

import tl_trainer
from conftest import Run, draw_split
from tl_trainer import checkpoint
from tl_trainer.added_class import solved
from tl_trainer.tables import FOLDS, Table, folds_of

SMALL: dict[str, Any] = {
    "model": {"backbone": "timm/test_resnet", "weights": "none"},
    "transforms": {"train": "eval", "eval": [{"Resize": [32, 32]}], "size": 32},
    "train": {"precision": "fp32"},
    "output": {"report": False, "tensorboard": False},
    "data": {"workers": 0},
}

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier whose head was found, and eight images of another colour."""
    folder = tmp_path_factory.mktemp("added")
    draw_split(folder / "photos" / "train", 8)
    draw_split(folder / "photos" / "val", 4, size=51)
    draw_split(folder / "more", 8, classes={"white": (230, 230, 230)})
    places = {"output__dir": str(folder / "runs"), "features__dir": str(folder / "cache")}
    tl_trainer.train(SMALL, data__root=str(folder / "photos"), **places)
    return folder


@pytest.fixture
def best(folder: Path) -> Path:
    return folder / "runs" / "run-1" / "best.pth"


def clusters(seed: int, each: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """So many features (N, 24) of each class, around a point that is the same for every seed."""
    middles = torch.randn(len(each), 24, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(len(each)).repeat_interleave(torch.tensor(each))
    return middles[targets] + 1.6 * torch.randn(
        len(targets), 24, generator=torch.Generator().manual_seed(seed)
    ), targets


def table(features: torch.Tensor, targets: torch.Tensor, classes: int) -> Table:
    soft = torch.nn.functional.one_hot(targets, classes).float()
    return Table(features, targets, soft, torch.arange(len(targets)))


def test_twenty_images_do_as_well_as_training_with_the_class() -> None:
    train, val = (table(*clusters(seed, each), 6) for seed, each in ((1, [100] * 5 + [20]), (2, [40] * 5 + [0])))
    fold = torch.cat([torch.full((500,), FOLDS), folds_of(torch.zeros(20, dtype=torch.int64), torch.arange(20))])
    head = solved(train, val, fold, ["standardised", "raw"])
    features, targets = clusters(3, [200] * 6)
    [(weight, bias)] = head.layers
    right = ((features @ weight.T + bias).argmax(dim=1) == targets).double()
    retrained = LogisticRegression(C=0.1, max_iter=1000).fit(train.features, train.targets)
    assert right.mean() >= retrained.score(features, targets) - 0.02
    assert right[-200:].mean() >= (retrained.predict(features) == targets.numpy())[-200:].mean() - 0.02
    held_out = (head.new.argmax(dim=1) == 5).double().mean()
    assert held_out == pytest.approx(right[-200:].mean().item(), abs=0.2)
    assert head.val.shape == (200, 6)
    assert torch.allclose(head.val, val.features @ weight.T + bias, atol=1e-4)


def test_the_new_run_is_taken_by_every_command(folder: Path, best: Path, tl: Run) -> None:
    words = ["train", "--add-class", "white", "--from", folder / "more" / "white", "--checkpoint", best]
    result = json.loads(tl(*words, f"features.dir={folder / 'cache'}", "--output", "out", "--json").stdout)
    assert result["run_dir"] == "out/run-1-white-1"
    assert result["solved_on"] == {"old": 24, "new": 8}
    assert result["old_classes"]["n"] == 12
    assert result["old_classes"]["top1_after"] >= result["old_classes"]["top1_before"] - 0.1
    assert result["new_class"] == {"n": 8, "recall": 1}
    assert result["val"]["n"] == 20
    saved, old = checkpoint.load(Path(result["checkpoint"])), checkpoint.load(best)
    assert saved.classes == ["blue", "green", "red", "white"]
    assert saved.config == old.config
    assert saved.conformal is not None
    assert len(saved.conformal) == 20
    model = tl_trainer.load("out")
    assert model.predict(Image.new("RGB", (40, 40), (225, 228, 230)))[0].predictions[0].label == "white"
    assert model.evaluate("val")["top1"] == result["old_classes"]["top1_after"]
    again = next(iter(model.rows([folder / "more" / "white" / "03.jpg"], extras=tl_trainer.Extras(neighbours=1))))
    assert [(one.label, Path(one.path).parent) for one in again.neighbours or ()] == [
        ("white", folder / "more" / "white")
    ]
    assert model.export("safetensors", "a.safetensors")["agreement"] == 1
    text = tl(*words, "--output", "out").stdout.splitlines()
    assert text[0].startswith("logistic regression, ")
    assert text[0].split("; ")[0].endswith("solved on the features of 24 old and 8 new images")
    assert text[2] == "white: 100.0% are recognised, each by a head that did not see it  (8 images)"
    assert text[3] == "checkpoint: out/run-1-white-2/best.pth"


def test_a_second_class_needs_the_images_of_the_first_or_would_unlearn_it(folder: Path, best: Path) -> None:
    shutil.copytree(folder / "photos", "photos")
    draw_split(Path("more"), 4, classes={"black": (20, 20, 20)})
    first = tl_trainer.load(best, data__root="photos").add_class("white", folder / "more" / "white")["checkpoint"]
    with pytest.raises(tl_trainer.InputError, match=r"^photos: no training image of 'white', and the new head would "):
        tl_trainer.load(first, data__root="photos").add_class("black", "more/black")
    shutil.copytree(folder / "more" / "white", "photos/train/white")
    second = tl_trainer.load(first, data__root="photos").add_class("black", "more/black")
    assert second["solved_on"] == {"old": 32, "new": 4}
    rows = tl_trainer.load(second["checkpoint"]).predict([folder / "more/white/01.jpg", "more/black/01.jpg"])
    assert [row.predictions[0].label for row in rows] == ["white", "black"]


def test_images_that_are_there_already_are_named(folder: Path, best: Path, caplog: pytest.LogCaptureFixture) -> None:
    tl_trainer.load(best).add_class("rosso", folder / "photos" / "val" / "red")
    assert "4 of 12 val images are in rosso too, 4 of them under another label, e.g. val/red/00.jpg is" in caplog.text


def test_what_cannot_be_added_is_refused_with_the_remedy(folder: Path, best: Path) -> None:
    model, white = tl_trainer.load(best), folder / "more" / "white"
    Path("one").mkdir()
    for name in ("a.jpg", "b.jpg"):  # copies
        shutil.copy(white / "00.jpg", Path("one", name))
    Path("empty").mkdir()
    for name, images, words in (
        ("red", white, r"^--add-class red: the checkpoint has this class already; it has blue, green, red$"),
        ("white", "gone", r"^--from gone: no such folder; give the one with the images of white$"),
        ("white", "empty", r"^--from empty: no images in this folder \(endings: "),
        ("white", "one", r"^--from one: one image of white is not enough; give two or more, better 20$"),
    ):
        with pytest.raises(tl_trainer.InputError, match=words):
            model.add_class(name, images)
    with pytest.raises(
        tl_trainer.InputError, match=r"(?s)gone.*images of the old classes too; .* with data\.root=DIR$"
    ):
        tl_trainer.load(best, data__root="gone").add_class("white", white)
    assert not list(Path("runs").glob("*"))


def test_another_head_than_a_linear_one_is_refused(folder: Path, best: Path) -> None:
    saved = checkpoint.load(best)
    config = {**saved.config, "model": {**saved.config["model"], "head": {"hidden": [8]}}}
    width = saved.features
    layers = {"0": (8, width), "2": (3, 8)}
    head = {f"head.{name}.weight": torch.zeros(shape) for name, shape in layers.items()}
    head |= {f"head.{name}.bias": torch.zeros(shape[0]) for name, shape in layers.items()}
    checkpoint.save(replace(saved, config=config, trained=head), Path("best.pth"))
    with pytest.raises(tl_trainer.InputError, match=r"needs a linear head, and this one has hidden layers; "):
        tl_trainer.load("best.pth").add_class("white", folder / "more" / "white")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--add-class", "a"], "--add-class a needs --from DIR, the folder with its images"),
        (["--from", "a"], "--from and --checkpoint belong to --add-class NAME; to go on with a run use --resume"),
        (["--add-class", "a", "--from", "b", "--config", "demo"], "--add-class takes the checkpoint's configuration; "),
    ],
)
def test_words_that_do_not_go_together(words: list[str], message: str, tl: Run) -> None:
    assert tl("train", *words).stderr.startswith(f"tl-train: {message}")
