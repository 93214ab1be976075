"""Images with several labels from end to end: the loss, a run that finds the head and one of epochs, every command."""

from __future__ import annotations

import csv
import io
import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import nn
from torchvision.ops import sigmoid_focal_loss

import tl_trainer
from conftest import COLOURS, Run, last_json
from tl_trainer import api, mlp
from tl_trainer.assembly import restore
from tl_trainer.candidates import LINEAR
from tl_trainer.checkpoint import load as load_checkpoint
from tl_trainer.comparison import find_mlp
from tl_trainer.config.load import load
from tl_trainer.config.training import LossSection
from tl_trainer.deployed import Deployed
from tl_trainer.errors import CheckpointError, ConfigError, DataError, InputError
from tl_trainer.export import described
from tl_trainer.metrics import Activation, Scores
from tl_trainer.multilabel import BinaryLoss, MultiLabel
from tl_trainer.tables import Table

NAMES = sorted(COLOURS)
TASK = MultiLabel(NAMES)
SMALL: dict[str, Any] = {
    "model": {"backbone": "timm/test_resnet", "weights": "none", "head": {"normalise": "l2"}},
    "transforms": {"train": "eval", "eval": [{"Resize": [32, 32]}], "size": 32},
    "train": {"batch_size": 16, "precision": "fp32"},
    "output": {"report": False, "tensorboard": False},
    "data": {
        "source": "csv",
        "task": "multilabel",
        "workers": 0,
        "csv": {"label_column": "tags", "split_column": "split"},
    },
}

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures with a bar of each of their colours, and the table of these."""
    folder, dice = tmp_path_factory.mktemp("several"), random.Random(0)
    rows = []
    for number in range(120):
        tags = [name for name in NAMES if dice.random() < 0.45]
        picture = Image.new("RGB", (32, 32), (number, 120, 120))
        for place, name in enumerate(tags):
            shade = tuple(max(0, min(255, value + dice.randrange(-20, 20))) for value in COLOURS[name])
            picture.paste(shade, (dice.randrange(20), 10 * place + 2, 32, 10 * place + 9))
        picture.save(folder / f"{number}.png")
        rows.append((f"{number}.png", "|".join(tags), "val" if number % 3 == 0 else "train"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "tags", "split"), *rows])
    return folder


@pytest.fixture(scope="module")
def found(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run that found its head."""
    folder = tmp_path_factory.mktemp("found")
    places = {"output__dir": str(folder / "runs"), "features__dir": str(folder / "cache")}
    return tl_trainer.train(SMALL, data__root=str(photos), output__report=True, output__tensorboard=True, **places)


def test_the_loss_is_torchs_where_all_is_known_and_masked_elsewhere() -> None:
    logits, targets = torch.randn(6, 3), torch.randint(0, 2, (6, 3))
    weights = torch.tensor([1.0, 3.0, 0.5])
    reference = nn.BCEWithLogitsLoss(pos_weight=weights)(logits, targets.float())
    torch.testing.assert_close(BinaryLoss(weights, None)(logits, targets), reference)
    masked = targets.clone()
    masked[0], masked[2, 1] = -1, -1
    some = masked >= 0
    expected = nn.BCEWithLogitsLoss()(logits[some], targets[some].float())
    torch.testing.assert_close(BinaryLoss(None, None)(logits, masked), expected)
    focal = sigmoid_focal_loss(logits, targets.float(), alpha=-1, gamma=2.0, reduction="mean")
    torch.testing.assert_close(BinaryLoss(None, 2.0)(logits, targets), focal)
    assert BinaryLoss(None, None)(logits, torch.full((6, 3), -1)) == 0


def test_a_label_counts_by_how_rare_it_is_where_that_is_asked_for() -> None:
    targets = [(1, 0, -1), (1, 0, 1), (0, 1, 1), (0, 0, 1)]
    loss = TASK.criterion(LossSection(class_weights="balanced"), targets)
    assert isinstance(loss, BinaryLoss)
    assert loss.weights is not None
    assert loss.weights.tolist() == [1, 3, 0]
    soft = TASK.soft_targets(LossSection(), targets)
    assert soft[0].tolist() == [[0, 1], [1, 0], [0, 0]]


def test_views_are_averaged_as_probabilities() -> None:
    views = [torch.tensor([[-2.0, 0.0]]), torch.tensor([[3.0, 1.0]])]
    expected = torch.stack(views).sigmoid().mean(dim=0)
    torch.testing.assert_close(TASK.averaged(views).sigmoid(), expected)
    assert TASK.averaged(views[:1]) is views[0]


def test_a_val_split_leaves_every_label_something_to_learn_from() -> None:
    targets = [(1, 0), (1, 0), (0, 1), (0, 1)] * 10
    held_out = MultiLabel(["a", "b"]).hold_out(targets, 0.25, 0)
    assert len(held_out) == 10
    assert sum(targets[index] == (1, 0) for index in held_out) == 5
    with pytest.raises(DataError, match="all images with 'b' are in the val split that was drawn; add images"):
        MultiLabel(["a", "b"]).hold_out([(1, 0), (1, 0), (0, 1), (0, 1)], 0.6, 0, groups=["x", "y", "z", "z"])
    with pytest.raises(DataError, match="1 images, or their groups, are too few for a val split"):
        TASK.hold_out([(1, 1, 1)], 0.2, 0)
    with pytest.raises(DataError, match="too few images, or groups of them, to divide into 3 folds"):
        TASK.folds([(1, 1, 1)] * 4, 3, 0, hashes=[b"a", b"a", b"b", b"b"])


def test_the_head_is_found_and_its_figures_are_those_of_scikit_learn(found: dict[str, Any], photos: Path) -> None:
    assert found["val"]["map"] > 0.9
    assert found["search"]["map"] == pytest.approx(found["val"]["map"], abs=0.1)
    model = tl_trainer.load(found["checkpoint"])
    assert (model.task, model.classes) == ("multilabel", NAMES)
    with (photos / "labels.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "val"]
    predicted = model.predict([photos / row["id"] for row in rows])
    share = [{one.label: one.probability for one in row.predictions} for row in predicted]
    shares = np.array([[of[name] for name in NAMES] for of in share])
    there = np.array([[name in row["tags"].split("|") for name in NAMES] for row in rows])
    evaluated = model.evaluate()
    assert evaluated["map"] == pytest.approx(average_precision_score(there, shares, average="macro"), abs=1e-4)
    said = np.array([[name in {one.label for one in row.labels or ()} for name in NAMES] for row in predicted])
    assert evaluated["exact"] == pytest.approx((said == there).all(axis=1).mean())
    assert evaluated["calibration"]["temperature"] == model.temperature


def test_its_report_and_its_files_are_of_labels(found: dict[str, Any]) -> None:
    run = Path(found["run_dir"])
    assert {path.name for path in (run / "report").iterdir()} == {
        "report.html", "metrics.json", "per_class.csv", "co_occurrence.csv", "predictions.csv", "co_occurrence.png",
        "reliability.png", "search.png",
    }  # fmt: skip
    page = (run / "report" / "report.html").read_text(encoding="utf-8")
    for text in ('<dd id="map">', "Which labels come together", "images with the label", "highest mAP was taken"):
        assert text in page
    with (run / "report" / "predictions.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 40
    right = sum({*json.loads(row["labels"])} == {*json.loads(row["label"])} for row in rows) / 40
    assert json.loads((run / "report" / "metrics.json").read_text())["exact"] == pytest.approx(right)
    assert (run / "metrics.csv").read_text().startswith("epoch,train_loss,val_loss,val_map,val_macro_f1,val_micro_f1,")
    assert (run / "search.csv").read_text().startswith("method,scaling,strength,loss,map,")


def test_the_commands_show_the_labels_above_their_threshold(tl: Run, found: dict[str, Any], photos: Path) -> None:
    given = [photos / "1.png", photos / "3.png", "--checkpoint", found["checkpoint"]]
    text, jsonl, table = (tl("predict", *given, "--format", form).stdout for form in ("text", "jsonl", "csv"))
    rows, lines = csv.DictReader(io.StringIO(table)), [*map(json.loads, jsonl.splitlines())]
    for line, in_words, row in zip(lines, text.splitlines(), rows, strict=True):
        names = [one["label"] for one in line["labels"]]
        assert json.loads(row["labels"]) == names
        assert [name for name in NAMES if name in in_words.split("(")[0]] == sorted(names)
    evaluated = tl("eval", found["checkpoint"])
    assert "mAP" in evaluated.stdout
    assert "with the thresholds: macro F1" in evaluated.stdout
    assert "the thresholds were chosen on these images" in evaluated.stderr
    flipped = last_json(tl("eval", found["checkpoint"], "--tta", "flip", "--json"))
    assert flipped["map"] > 0.8
    assert "val mAP" in tl("eval", Path(found["run_dir"]).parent, "--split", "val").stderr
    assert "mAP" in tl("train", "--list", "runs", f"{Path(found['run_dir']).parent}/*").stdout


def test_the_bundled_configuration_holds_out_a_fifth_of_each_label(tl: Run, photos: Path) -> None:
    columns = ["data.csv.image_column=id", "data.csv.label_column=tags", "data.workers=0"]
    network = ["model={backbone: timm/test_resnet, weights: none, head: {normalise: l2}}", "transforms.size=32"]
    words = ["output.report=false", "output.tensorboard=false", "train.precision=fp32"]
    result = last_json(
        tl("train", "--config", "multilabel.yaml", "--data-dir", photos, *columns, *network, *words, "--json")
    )
    assert result["val"]["n"] == 24
    assert result["val"]["map"] > 0.8


def test_evidence_is_drawn_for_each_label(found: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    model = tl_trainer.load(found["checkpoint"])
    extras = tl_trainer.Extras(evidence=tmp_path / "evidence", neighbours=1)
    rows = [*model.rows([photos / f"{number}.png" for number in range(4)], extras=extras)]
    drawn = len([*(tmp_path / "evidence").iterdir()])
    assert drawn == sum(max(1, len(row.labels or ())) for row in rows) > 4
    assert rows[0].neighbours is not None
    kept = next(iter(model.rows([photos / "0.png"], extras=tl_trainer.Extras(neighbours=1))))  # from neighbours.pth
    assert [one.label for one in kept.neighbours or ()] == [one.label for one in rows[0].neighbours]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--coverage", "0.9"], "makes sets of classes of which one is right, and here an image may have several"),
        (["data.task=single"], "the checkpoint is of data.task: multilabel, and single was asked for"),
    ],
)
def test_tl_eval_refuses_what_is_for_one_class(tl: Run, found: dict[str, Any], words: list[str], message: str) -> None:
    refused = tl("eval", found["checkpoint"], *words)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.count("\n") <= 3


def test_add_class_folds_and_check_are_refused(found: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="adds a class to those of which an image has one"):
        tl_trainer.load(found["checkpoint"]).add_class("owl", photos, output=tmp_path)
    with pytest.raises(ConfigError, match="--folds judges classifiers of one class per image"):
        tl_trainer.cross_validate(SMALL, data__root=str(photos))
    with pytest.raises(ConfigError, match="a check compares the one class of each image"):
        tl_trainer.check(SMALL, data__root=str(photos))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"loss": {"label_smoothing": 0.1}},
            r"train\.loss\.label_smoothing moves mass to classes",
        ),
        ({"sampler": "balanced"}, r"train\.sampler takes every class equally often"),
        ({"mixup": 0.2}, r"train\.mixup mixes images of one class each"),
        ({"cutmix": 1.0}, r"train\.cutmix mixes images of one class each"),
        ({"teacher": {"checkpoint": "x"}, "search": "off"}, r"train\.teacher compares probabilities"),
        ({"best": "top1"}, r"train\.best is top1, and data\.task multilabel; set it to map, loss"),
        ({"stop": {"metric": "balanced_accuracy"}}, r"train\.stop\.metric is balanced_accuracy"),
        ({"thresholds": "recall>=0.9"}, r"train\.thresholds"),
        ({"search": "auto", "loss": {"focal": 2.0}}, "loss.focal is for training by epochs"),
    ],
)
def test_what_means_nothing_for_several_labels_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"data": {"task": "multilabel"}, "train": given})


@pytest.mark.parametrize("given", [{"best": "map"}, {"loss": {"focal": 2.0}}, {"thresholds": 0.4}])
def test_what_means_nothing_for_one_class_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"single"):
        load({"train": given})


def test_best_is_map_unless_it_is_set_and_survives_a_round_trip(tmp_path: Path) -> None:
    config = load({"data": {"task": "multilabel"}}).config
    assert (config.train.best, config.train.search) == ("map", "auto")
    assert load(config.model_dump()).config == config


def test_a_run_of_epochs_goes_on_where_it_was(photos: Path, tmp_path: Path) -> None:
    loss = {"class_weights": "balanced", "focal": 1.0}
    more = {"loss": loss, "thresholds": "precision>=0.8", "optimizer": {"lr": 0.01}}
    settings = {"train": {**SMALL["train"], **more}}
    config = {**SMALL, **settings, "data": {**SMALL["data"], "root": str(photos)}}
    whole = tl_trainer.train(config, train__epochs=4, output__dir=str(tmp_path / "whole"))
    part = tl_trainer.train(config, train__epochs=2, output__dir=str(tmp_path / "part"))
    resumed = tl_trainer.train(config, train__epochs=4, output__dir=str(tmp_path / "part"), resume=part["run_dir"])
    assert resumed["val"] == whole["val"]
    saved, again = (load_checkpoint(Path(result["checkpoint"])) for result in (whole, resumed))
    assert saved.thresholds == again.thresholds
    assert saved.thresholds is not None
    assert saved.temperature == again.temperature
    assert all(torch.equal(saved.trained[key], again.trained[key]) for key in saved.trained)


def test_hidden_layers_are_found_too() -> None:
    features = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    targets = (features[:, :2] * features[:, 2:4] > 0).long()
    targets[::9, 1] = -1
    soft = MultiLabel(["a", "b"]).soft_targets(LossSection(), targets.tolist())
    table = Table(features, targets, soft, torch.arange(90))
    train, val = table.part(torch.arange(60)), table.part(torch.arange(60, 90))
    train, val = train._replace(images=torch.arange(60)), val._replace(images=torch.arange(30))
    found = find_mlp(train, val, mlp.Plan([16], 20, 0), [0.25])
    assert found.several
    assert found.best.method == "MLP 16"
    assert found.best.top1 > max(row.top1 for row in found.rows if row.method == LINEAR)


def test_an_export_gives_each_label_its_own_probability(found: dict[str, Any], tmp_path: Path) -> None:
    result = tl_trainer.load(found["checkpoint"]).export("safetensors", tmp_path / "labels.safetensors")
    assert (result["agreement"], result["images"]) == (1, 40)
    parts = restore(Path(found["checkpoint"]))
    assert parts.saved is not None
    assert described(parts, "tensor")["thresholds"] == parts.saved.thresholds
    batch = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    shares = Deployed(None, parts.network.classifier, [Activation(3, 2.0, several=True)])(batch)
    torch.testing.assert_close(shares, (parts.network.classifier(batch) / 2).sigmoid())


def test_copies_under_other_labels_are_named(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = (photos / "labels.csv").read_text().splitlines()
    (tmp_path / "again.png").write_bytes((photos / "1.png").read_bytes())
    for line in lines[1:]:
        name = line.split(",")[0]
        (tmp_path / name).write_bytes((photos / name).read_bytes())
    (tmp_path / "labels.csv").write_text("\n".join([*lines, "again.png,blue|green|red,train"]) + "\n")
    with caplog.at_level(logging.WARNING):
        api.dry_run(SMALL, data__root=str(tmp_path))
    assert "2 of 81 train images have a copy under another label" in caplog.text


def test_a_checkpoint_of_another_task_is_no_teacher(found: dict[str, Any], colours: Path) -> None:
    single = {**SMALL, "data": {"workers": 0, "root": str(colours)}}
    with pytest.raises(ConfigError, match="several labels per image, and the data has one class"):
        tl_trainer.train(single, train__teacher__checkpoint=found["checkpoint"], train__epochs=1)


def test_a_damaged_threshold_is_no_checkpoint(found: dict[str, Any], tmp_path: Path) -> None:
    from tl_trainer.ground.sealed import load_plain, save_sealed

    content = load_plain(Path(found["checkpoint"]), mapped=False)
    save_sealed(tmp_path / "best.pth", {**content, "thresholds": "high"})
    with pytest.raises(CheckpointError, match="damaged checkpoint: thresholds is missing or of the wrong kind"):
        tl_trainer.load(tmp_path / "best.pth")


def test_mistakes_are_told_by_what_was_predicted() -> None:
    scores = Scores(torch.tensor([[2.0, -2, -3], [-1, -1, 4]]), torch.tensor([[1, 1, 0], [0, 0, 1]]))
    assert TASK.mistakes(scores, 5) == {0: "blue"}
    assert TASK.caption((1, 0, 1)) == "blue, red"
    assert TASK.caption((0, -1, 0)) == "no label"


def test_one_label_is_told_to_be_a_class_of_two(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "labels.csv").write_text("id,wet\n0.png,1\n", encoding="utf-8")
    data = {"source": "csv", "task": "multilabel", "root": str(tmp_path), "csv": {"label_columns": ["wet"]}}
    with pytest.raises(DataError, match=r"needs two; a question of yes or no is one column"):
        tl_trainer.train({"data": data}, output__dir=str(tmp_path / "runs"))
