"""Several heads from end to end: what they share and what not, missing labels, every command, what is refused."""

from __future__ import annotations

import csv
import io
import json
import random
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import tl_trainer
from conftest import COLOURS, Run, last_json
from tl_trainer import run
from tl_trainer.candidates import LINEAR, MEANS, UNIT, Row
from tl_trainer.checkpoint import Calibration
from tl_trainer.checkpoint import load as load_checkpoint
from tl_trainer.cli.train import _report as cli_report
from tl_trainer.comparison import Compared, _Solved
from tl_trainer.config.data import CsvSection
from tl_trainer.config.load import load
from tl_trainer.config.training import HeadOptions, LossSection, TrainSection
from tl_trainer.data.csv_table import open_csv
from tl_trainer.data.dataset import Dataset
from tl_trainer.data.label_texts import differ, heads_in
from tl_trainer.errors import ConfigError, DataError, InputError, RunError
from tl_trainer.metrics import Scores
from tl_trainer.multitask import MultiTask, multitask
from tl_trainer.network import Network
from tl_trainer.range_test import FEWEST, find_rate
from tl_trainer.search import alike

COLUMNS = CsvSection(label_columns=["colour", "size", "tags"], multilabel_columns=["tags"], split_column="split")
CLASSES = ["colour=blue", "colour=green", "colour=red", "size=big", "size=small", "tags:dark", "tags:left"]
SMALL: dict[str, Any] = {
    "model": {"backbone": "timm/test_resnet", "weights": "none"},
    "transforms": {"train": "eval", "eval": [{"Resize": [32, 32]}], "size": 32},
    "train": {"batch_size": 16, "precision": "fp32", "epochs": 60, "optimizer": {"lr": 0.05}},
    "output": {"report": False, "tensorboard": False},
    "data": {"source": "csv", "task": "multitask", "workers": 0, "csv": COLUMNS.model_dump()},
}

pytestmark = pytest.mark.usefixtures("own_logging")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of a square, and the table of its colour, its size and what else there is; some cells are empty."""
    folder, dice = tmp_path_factory.mktemp("heads"), random.Random(0)
    rows = []
    for number in range(120):
        colour, size = dice.choice(sorted(COLOURS)), dice.choice(["big", "small"])
        tags = [tag for tag in ("dark", "left") if dice.random() < 0.5]
        ground = 30 if "dark" in tags else 220
        picture = Image.new("RGB", (32, 32), (ground, ground, min(255, ground + number % 30)))
        left, side = 0 if "left" in tags else 16, 14 if size == "big" else 5
        picture.paste(COLOURS[colour], (left + 1, 9, left + 1 + side, 9 + side))
        picture.save(folder / f"{number}.png")
        shown = colour if number % 8 else "", size if number % 5 else "", "|".join(tags)
        rows.append((f"{number}.png", *shown, "val" if number % 3 == 0 else "train"))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "colour", "size", "tags", "split"), *rows])
    return folder


@pytest.fixture(scope="module")
def trained(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a run."""
    folder = tmp_path_factory.mktemp("trained")
    places = {"output__dir": str(folder / "runs"), "features__dir": str(folder / "cache")}
    heads = {"colour": {"weight": 2.0, "best": "macro_f1"}}
    shown = {"output__report": True, "output__tensorboard": True}
    return tl_trainer.train(SMALL, data__root=str(photos), train__heads=heads, **shown, **places)


def opened(folder: Path, rows: str, section: CsvSection = COLUMNS) -> Dataset:
    (folder / "labels.csv").write_text("id,colour,size,tags,split\n" + rows, encoding="utf-8")
    return open_csv(folder, section, None, "exact", "multitask")


def task(**options: HeadOptions) -> MultiTask:
    return multitask(TrainSection(heads=options, best="mean"), CLASSES)


def some(count: int = 60, seed: int = 0) -> Scores:
    """Logits, and targets of which some heads have none."""
    draw = torch.Generator().manual_seed(seed)
    colour, size = (nn.functional.one_hot(torch.randint(n, (count,), generator=draw), n) for n in (3, 2))
    targets = torch.cat([colour, size, torch.randint(2, (count, 2), generator=draw)], dim=1)
    targets[::4, :3], targets[1::5, 3:5] = -1, -1
    return Scores(torch.randn(count, 7, generator=draw), targets)


def test_a_column_is_a_head_and_an_empty_cell_is_not_known(tmp_path: Path) -> None:
    dataset = opened(tmp_path, "a,red,big,dark|left,train\nb,,small,,train\nc,blue,,left,train\nd,red,small,,val\n")
    assert dataset.classes == ["colour=blue", "colour=red", "size=big", "size=small", "tags:dark", "tags:left"]
    assert dataset.split("train").targets == [(0, 1, 1, 0, 1, 1), (-1, -1, 0, 1, 0, 0), (1, 0, -1, -1, 0, 1)]
    assert heads_in(dataset.classes) == [
        ("colour", False, ["blue", "red"]), ("size", False, ["big", "small"]), ("tags", True, ["dark", "left"]),
    ]  # fmt: skip
    assert not differ((1, 0, -1), (1, 0, 1))
    assert differ((1, 0, -1), (0, 1, 1))


def test_a_class_that_is_left_out_says_nothing_of_its_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "labels.csv").write_text("id,colour,size,tags,split\na,pink,big,dark,val\nb,red,huge,,val\n")
    dataset = open_csv(tmp_path, COLUMNS, CLASSES, "any", "multitask")
    assert [dataset.split("val").targets[row][:5] for row in (0, 1)] == [
        tuple(-1 if name.startswith("colour") else int(name == "size=big") for name in CLASSES[:5]),
        tuple(-1 if name.startswith("size") else int(name == "colour=red") for name in CLASSES[:5]),
    ]
    assert "labels that the checkpoint does not have are left out: colour=pink, size=huge" in caplog.text


def test_wrong_tables_are_named(tmp_path: Path) -> None:
    single = CsvSection(label_columns=["colour", "size"], split_column="split")
    with pytest.raises(DataError, match=r"csv:3: no label in any of colour, size; fill in one, or leave the row out"):
        opened(tmp_path, "a,red,big,,train\nb,,,,train\n", single)
    with pytest.raises(DataError, match=r"the column size has 1 classes in the train rows, and a head needs 2 or more"):
        opened(tmp_path, "a,red,big,dark,train\nb,blue,big,,train\n")
    with pytest.raises(DataError, match=r"csv:4: unknown label 'colour=pink'"):
        opened(tmp_path, "a,red,big,dark,train\nb,blue,small,,train\nc,pink,big,,val\n")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"csv": {"label_columns": ["colour"]}}, "has a head per column; name two or more in csv.label_columns"),
        ({"csv": {"label_columns": ["a", "b"], "multilabel_columns": ["c"]}}, "has c, which is none of label_columns"),
        ({"csv": {"label_columns": ["a=b", "c"]}}, "a head cannot be called 'a=b'; rename the column"),
        ({"csv": {"label_columns": ["a/b", "c"]}}, "a head cannot be called 'a/b'; rename the column"),
        ({"csv": {"label_columns": ["c", "c"]}}, "label_columns: names 'c' twice; leave one out"),
        ({"csv": {"label_columns": ["path", "c"]}}, "a head cannot be called 'path'; rename the column"),
        ({"csv": {"label_columns": ["c", "c_probability"]}}, "a head cannot be called 'c_probability'; rename"),
        ({"source": "imagefolder"}, "task multitask reads csv, parquet, and source is imagefolder"),
    ],
)
def test_heads_need_columns(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"data": {"source": "csv", "task": "multitask", **given}})


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ({"heads": {"age": {"weight": 2.0}}}, "train.heads has age, and the heads are colour, size, tags"),
        ({"heads": {"tags": {"best": "top1"}}}, "train.heads.tags.best is top1; set it to map, macro_f1, micro_f1"),
        ({"heads": {"size": {"best": "loss"}}}, "is loss; set it to top1, balanced_accuracy, macro_f1"),
        ({"best": "top1"}, "train.best is top1, and data.task multitask; set it to mean, loss"),
        ({"loss": {"label_smoothing": 0.1}}, "label_smoothing moves mass to classes that exclude a label"),
        ({"mixup": 0.2}, "mixup mixes images of one class each"),
        ({"search": "auto", "heads": {"size": {"best": "macro_f1"}}}, "the best of heads is for training by epochs"),
    ],
)
def test_what_means_nothing_for_heads_is_refused(train: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load({"data": SMALL["data"], "train": train})
    with pytest.raises(ConfigError, match=r"heads is for data\.task: multitask, and that is single"):
        load({"train": {"heads": {"a": {}}}})


@pytest.mark.parametrize("section", [LossSection(), LossSection(class_weights="balanced")])
def test_heads_that_are_trained_together_are_those_that_are_trained_alone(section: LossSection) -> None:
    whole, (_, targets) = task(colour=HeadOptions(weight=2.0)), some(96)
    features = torch.randn(96, 8, generator=torch.Generator().manual_seed(1))
    start = torch.randn(7, 8, generator=torch.Generator().manual_seed(2)) / 4

    def trained(criterion: nn.Module, rows: Tensor, own: Tensor, weight: Tensor) -> Tensor:
        head = nn.Linear(8, len(weight), bias=False)
        head.load_state_dict({"weight": weight})
        optimizer = torch.optim.SGD(head.parameters(), 0.1)
        for _ in range(50):
            loss = criterion(head(rows), own)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return head.weight.detach()

    together = trained(whole.criterion(section, targets.tolist()), features, targets, start)
    for head in whole.heads:
        rows, own = head.own(targets)
        alone = head.task.criterion(section, own.tolist())

        def weighed(logits: Tensor, given: Tensor, alone: nn.Module = alone, weight: float = head.weight) -> Tensor:
            found: Tensor = weight * alone(logits, given)
            return found

        expected = trained(weighed, features[rows], own, start[head.of])  # type: ignore[arg-type]
        torch.testing.assert_close(together[head.of], expected, atol=1e-5, rtol=0)


def test_label_smoothing_is_that_of_each_head() -> None:
    whole = multitask(TrainSection(best="mean"), CLASSES[:5])
    section = LossSection(label_smoothing=0.2, class_weights="balanced")
    logits, targets = some()
    found = whole.criterion(section, targets[:, :5].tolist())(logits[:, :5], targets[:, :5])
    expected = torch.zeros(())
    for head in whole.heads:
        rows, own = head.own(targets)
        expected = expected + head.task.criterion(section, own.tolist())(logits[rows, head.of], own)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("section", [LossSection(), LossSection(class_weights="balanced")])
@pytest.mark.parametrize("weight", [1.0, 50.0])
def test_a_batch_without_a_label_of_a_head_teaches_it_nothing(section: LossSection, weight: float) -> None:
    logits, targets = some(4)
    targets[:, :3] = -1
    logits, whole = logits.requires_grad_(), task(colour=HeadOptions(weight=weight))
    rows = [tuple(row) for row in some().targets.tolist()]
    rows = [*rows, *[row for row in rows if row[0] == 1] * 50]  # so that balanced weights of the others are large
    loss = whole.criterion(section, rows)(logits, targets)
    loss.backward()
    others = MultiTask([replace(head, of=slice(head.of.start - 3, head.of.stop - 3)) for head in whole.heads[1:]])
    expected = others.criterion(section, [row[3:] for row in rows])(logits[:, 3:], targets[:, 3:])
    torch.testing.assert_close(loss, expected)
    assert logits.grad is not None
    assert logits.grad[:, :3].abs().max() == 0
    assert logits.grad[:, 3:].abs().max() > 0


def test_figures_are_those_of_each_head_and_their_weighted_mean() -> None:
    whole, scores = task(colour=HeadOptions(weight=3.0, best="balanced_accuracy")), some()
    figures = whole.figures(scores)
    parts = {head.name: head.task.figures(head.part(scores)) for head in whole.heads}
    assert len(whole.heads[0].part(scores).targets) == 45
    mean = (3 * parts["colour"]["balanced_accuracy"] + parts["size"]["top1"] + parts["tags"]["map"]) / 5
    assert figures["mean"] == pytest.approx(mean)
    loss = 3 * parts["colour"]["loss"] + parts["size"]["loss"] + parts["tags"]["loss"]
    assert figures["loss"] == pytest.approx(loss)
    assert [*figures] == ["loss", "mean", "n", "colour/balanced_accuracy", "size/top1", "tags/map"]
    whole.check(figures)
    with pytest.raises(ValueError, match="mean"):
        whole.check({**figures, "mean": 2.0})
    missing = Scores(scores.logits, torch.where(torch.arange(7) < 3, -1, scores.targets))
    found = whole.figures(missing)
    assert found["mean"] == pytest.approx((parts["size"]["top1"] + parts["tags"]["map"]) / 2)
    assert whole.measure(missing, None, "none")["undefined"]["heads colour"] == "no image has a label of it"


def test_each_head_has_its_own_temperature_and_probabilities() -> None:
    whole, scores = task(), some(200)
    calibration = whole.calibration(scores)
    assert isinstance(calibration, Calibration)
    assert [one is not None for one in calibration.temperature] == [True, True, True]
    shares = whole.probabilities(scores.logits, calibration)
    torch.testing.assert_close(shares[:, :3].sum(dim=1), torch.ones(200, dtype=torch.float64))
    alone = whole.heads[1]
    expected = alone.task.probabilities(scores.logits[:, 3:5], calibration.temperature[1])
    torch.testing.assert_close(shares[:, 3:5], expected)
    views = [scores.logits, scores.logits + 1]
    torch.testing.assert_close(whole.averaged(views)[:, 3:5].softmax(dim=1), views[0][:, 3:5].softmax(dim=1))


def test_a_run_learns_all_heads_and_its_commands_show_them(tl: Run, trained: dict[str, Any], photos: Path) -> None:
    assert trained["val"]["mean"] > 0.75
    assert {"colour/macro_f1", "size/top1", "tags/map"} < trained["val"].keys()
    path = trained["checkpoint"]
    evaluated = last_json(tl("eval", path, "--json"))
    assert {name: of["n"] for name, of in evaluated["heads"].items()} == {"colour": 35, "size": 32, "tags": 40}
    assert evaluated["mean"] == pytest.approx(trained["val"]["mean"])
    text = tl("eval", path, "--tta", "flip").stdout
    assert [line.split(":")[0].strip() for line in text.splitlines()[2:]] == ["colour", "size", "tags"]
    given = [photos / "1.png", photos / "2.png", "--checkpoint", path]
    shown, jsonl, table = (tl("predict", *given, "--format", form).stdout for form in ("text", "jsonl", "csv"))
    rows = [*csv.DictReader(io.StringIO(table))]
    for line, row, in_words in zip(map(json.loads, jsonl.splitlines()), rows, shown.splitlines(), strict=True):
        heads = line["heads"]
        assert row["colour"] == heads["colour"]["predictions"][0]["label"]
        assert json.loads(row["tags"]) == [one["label"] for one in heads["tags"]["labels"]]
        assert f"colour={row['colour']}" in in_words
    saved = load_checkpoint(Path(path))
    assert isinstance(saved.temperature, list)
    assert saved.classes == CLASSES
    model = tl_trainer.load(path)
    assert (model.task, model.heads) == ("multitask", ["colour", "size", "tags"])


def test_its_report_has_a_part_for_each_head(trained: dict[str, Any]) -> None:
    report = Path(trained["run_dir"]) / "report"
    assert {path.name for path in report.iterdir()} == {
        "report.html", "metrics.json", "per_class.csv", "co_occurrence.csv", "predictions.csv", "reliability.png",
        "confusion_matrix_colour.png", "confusion_matrix_size.png", "co_occurrence_tags.png", "epochs.png",
    }  # fmt: skip
    page = (report / "report.html").read_text(encoding="utf-8")
    for text in ("Confusion matrix of", "Which labels come together in", '<table id="heads">', "colour=blue"):
        assert text in page


def test_evidence_safetensors_and_what_is_refused(trained: dict[str, Any], photos: Path, tmp_path: Path) -> None:
    model = tl_trainer.load(trained["checkpoint"])
    row = next(
        iter(model.rows([photos / "1.png"], extras=tl_trainer.Extras(evidence=tmp_path / "evidence", neighbours=1)))
    )
    assert len([*(tmp_path / "evidence").iterdir()]) == len(row.predictions) >= 2
    for to in ("safetensors", "pt2", "hub"):
        assert model.export(to, tmp_path / f"x.{to}")["agreement"] == 1
    described = json.loads((tmp_path / "x.hub" / "config.json").read_text())["tl_trainer"]
    assert [(head["classes"], head["several"]) for head in described["heads"]] == [(3, False), (2, False), (2, True)]
    card = (tmp_path / "x.hub" / "README.md").read_text()
    assert (
        f"- 3 to 4: the softmax of the logits divided by {described['heads'][1]['temperature']}\n- 5 to 6: the sig"
        in card
    )
    with pytest.raises(InputError, match="sets of classes of which one is right"):
        model.evaluate(coverage=0.9)
    with pytest.raises(ConfigError, match="--folds judges classifiers of one class"):
        tl_trainer.cross_validate(SMALL, data__root=str(photos))


def test_a_run_goes_on_where_it_was_and_passes_the_backbone_once_for_all_heads(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    forward = Network.logits

    def counted(self: Network, features: Tensor) -> Tensor:
        calls.append(len(features))
        return forward(self, features)

    monkeypatch.setattr(Network, "logits", counted)
    config = {
        **SMALL,
        "model": {**SMALL["model"], "trainable": "layer4"},
        "data": {**SMALL["data"], "root": str(photos)},
    }
    config["train"] = {**SMALL["train"], "search": "off", "freeze_batchnorm": True}
    whole = tl_trainer.train(config, train__epochs=2, output__dir=str(tmp_path / "whole"))
    assert calls == 2 * ([16] * 5 + [16, 16, 8])  # of 80 and 40 images, whatever the number of heads
    part = tl_trainer.train(config, train__epochs=1, output__dir=str(tmp_path / "part"))
    again = tl_trainer.train(config, train__epochs=2, output__dir=str(tmp_path / "part"), resume=part["run_dir"])
    assert again["val"] == whole["val"]


FOUND: dict[str, Any] = {**SMALL, "train": {"batch_size": 16, "precision": "fp32"}}


def written(folder: Path, photos: Path, **changed: Any) -> None:
    """The table of the pictures in another folder, each cell as `changed` makes it of its row."""
    with (photos / "labels.csv").open(newline="") as file:
        rows = [{**row, "id": str(photos / row["id"])} for row in csv.DictReader(file)]
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows({**row, **{name: of(row) for name, of in changed.items()}} for row in rows)


@pytest.mark.parametrize(("refit", "normalise"), [(False, "none"), (True, "l2")])
def test_the_heads_are_found_each_as_if_it_were_alone(
    photos: Path, tmp_path: Path, refit: bool, normalise: str
) -> None:
    head = {"head": {"normalise": normalise}}
    config = {**FOUND, "model": {**SMALL["model"], **head}, "train": {**FOUND["train"], "refit": refit}}
    result = tl_trainer.train(config, data__root=str(photos), output__dir=str(tmp_path / "runs"))
    state = load_checkpoint(Path(result["checkpoint"])).trained
    assert [*result["search"]["heads"]] == ["colour", "size", "tags"]
    assert result["search"]["refit"] == refit
    for name, kind in (("colour", "single"), ("size", "single"), ("tags", "multilabel")):
        own = tmp_path / name
        own.mkdir()
        with (photos / "labels.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row[name] or kind == "multilabel"]
        text = "".join(f"{photos / row['id']},{row[name]},{row['split']}\n" for row in rows)
        (own / "labels.csv").write_text("id,label,split\n" + text, encoding="utf-8")
        section = {"image_column": "id", "label_column": "label", "split_column": "split"}
        data = {"source": "csv", "task": kind, "workers": 0, "csv": section}
        alone = tl_trainer.train({**config, "data": data}, data__root=str(own), output__dir=str(own / "runs"))
        assert alone["search"] == result["search"]["heads"][name]
        [at] = [part.of for part in task().heads if part.name == name]
        theirs = load_checkpoint(Path(alone["checkpoint"])).trained
        for key, value in state.items():
            torch.testing.assert_close(value[at], theirs[key], atol=1e-5, rtol=1e-5)
        figure = {"colour": "colour/top1", "size": "size/top1", "tags": "tags/map"}[name]
        assert result["val"][figure] == pytest.approx(alone["val"][figure.partition("/")[2]])


def test_heads_that_are_found_share_what_their_features_are_scaled_to_and_are_told_one_by_one(
    photos: Path, tmp_path: Path
) -> None:
    shown = {"output__report": True, "output__tensorboard": True, "output__dir": str(tmp_path / "runs")}
    result = tl_trainer.train(FOUND, data__root=str(photos), train__heads={"colour": {"weight": 50.0}}, **shown)
    found, run_dir = result["search"]["heads"], Path(result["run_dir"])
    unit = load_checkpoint(Path(result["checkpoint"])).config["model"]["head"]["normalise"] == "l2"
    assert {one["scaling"] == UNIT for one in found.values()} == {unit}
    with (run_dir / "search.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    for name, measure in (("colour", "top1"), ("size", "top1"), ("tags", "map")):
        own = [row for row in rows if row["head"] == name]
        assert len(own) == found[name]["candidates"]
        assert {row["measure"] for row in own} == {measure}
        assert {row["scaling"] for row in own} == {"standardised", "raw", UNIT}
    page = Path(result["report"]).read_text()
    assert page.count('<table id="search">') == 1
    assert page.count("All heads take features of length 1, or none does") == 3
    assert [page.count(f"How the head of {name} was found") for name in found] == [1, 1, 1]
    folders = {path.name for path in (run_dir / "search").iterdir()}
    assert {"colour_1", "size_1", "tags_raw"} < folders
    said = cli_report(result).splitlines()
    assert [line.partition(":")[0] for line in said[:3]] == [*found]
    model = tl_trainer.load(result["run_dir"])
    assert model.evaluate("val")["mean"] == pytest.approx(result["val"]["mean"])


@pytest.mark.parametrize(("weight", "unit"), [(0.1, False), (10.0, True)])
def test_whether_features_have_length_1_is_decided_by_the_losses_of_all_heads(weight: float, unit: bool) -> None:
    heads = task(colour=HeadOptions(weight=weight)).heads[:2]

    def compared(of_unit: float, of_others: float) -> Compared:
        rows = [Row(LINEAR, UNIT, 1.0, of_unit, 0.5), Row(LINEAR, "raw", 1.0, of_others, 0.5)]
        means = Row(MEANS, UNIT, 0.0, None, 0.9)
        return Compared([_Solved(row, torch.tensor([row.loss]), []) for row in rows], [means], "val", 9, 0, False)

    found = alike(heads, [compared(0.5, 0.7), compared(0.4, 0.1)], [False, True])
    assert [of.unit for of in found] == [unit, unit]
    assert [len(of.rows) for of in found] == [3, 3]
    assert [len(of.shown()) for of in found] == ([2, 2] if unit else [1, 1])  # those of another length cannot be had
    assert (found[0].remark() is not None) == unit


def test_a_scaling_for_which_a_head_does_not_converge_is_left_out_and_the_head_named() -> None:
    def compared(*notes: str) -> Compared:
        rows = [Row(LINEAR, name, 1.0, 0.5, 0.5, note) for name, note in zip(("raw", UNIT), notes, strict=True)]
        return Compared([_Solved(row, torch.tensor([row.loss]), []) for row in rows], [], "val", 9, 0, False)

    heads = task().heads[:2]
    assert all(of.unit for of in alike(heads, [compared("", ""), compared("diverged", "")], [False, True]))
    with pytest.raises(RunError, match="size: none of the heads that were compared converged"):
        alike(heads, [compared("", ""), compared("diverged", "diverged")], [False, True])


def test_an_image_without_a_label_of_a_head_is_judged_by_the_refitted_head(photos: Path, tmp_path: Path) -> None:
    config = {**FOUND, "train": {**FOUND["train"], "refit": True}, "output": {**SMALL["output"], "report": True}}
    result = tl_trainer.train(config, data__root=str(photos), output__dir=str(tmp_path / "runs"))
    with (Path(result["run_dir"]) / "report" / "predictions.csv").open(newline="") as file:
        [row] = [row for row in csv.DictReader(file) if row["path"].endswith("15.png")]
    [said] = tl_trainer.load(result["run_dir"]).predict([photos / "15.png"])
    size, tags = (said.heads[name].predictions[0] for name in ("size", "tags"))
    shares = {row[f"class{end}"]: float(row[f"probability{end}"]) for end in ("_2", "_3")}
    assert shares[f"size={size.label}"] == pytest.approx(size.probability, abs=1e-5)  # of which it has no label
    assert shares[f"tags:{tags.label}"] != pytest.approx(tags.probability, abs=1e-5)


def test_heads_that_are_found_are_trained_on_also_after_a_kill(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases = [{"trainable": "head", "search": "auto", "augment": True}, {"trainable": "layer4", "epochs": 2}]
    config = {
        **FOUND,
        "train": {**FOUND["train"], "phases": phases, "freeze_batchnorm": True},
        "transforms": {**SMALL["transforms"], "train": ["RandomHorizontalFlip", {"Resize": [32, 32]}]},
        "features": {"views": 2},
    }
    places = {"data__root": str(photos), "output__dir": str(tmp_path / "runs")}
    whole = tl_trainer.train(config, **places)
    with (Path(whole["run_dir"]) / "search.csv").open(newline="") as file:
        assert {row["head"] for row in csv.DictReader(file)} == {"colour", "size", "tags"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(run, "fit", lambda *_: signal.raise_signal(signal.SIGINT))
        tl_trainer.train(config, **places)
    part = tmp_path / "runs" / "run-2"
    assert (part / "search.csv").exists()
    assert tl_trainer.train(config, **places, resume=str(part))["val"] == whole["val"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"size": lambda row: row["size"] if row["split"] == "train" else ""}, "0 val images have a label of size"),
        ({}, "several heads share its hidden layers"),
    ],
)
def test_why_heads_are_not_found_is_said(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: dict[str, Any], said: str
) -> None:
    caplog.set_level("INFO", logger="tl_trainer")
    written(tmp_path, photos, **changed)
    model = SMALL["model"] if changed else {**SMALL["model"], "head": {"hidden": [4]}}
    result = tl_trainer.train({**FOUND, "model": model}, data__root=str(tmp_path), output__dir=str(tmp_path / "runs"))
    assert f"instead of being searched for: {said}" in caplog.text
    assert result["best_epoch"] >= 1


def test_the_bundled_configuration_trains(tl: Run, photos: Path) -> None:
    columns = ["data.csv.image_column=id", "data.csv.label_columns=[colour, size]", "data.workers=0"]
    network = ["model={backbone: timm/test_resnet, weights: none}", "transforms.size=32", "train.precision=fp32"]
    words = ["--data-dir", photos, "output.report=false", "output.tensorboard=false", "--json"]
    refused = tl("train", "--config", "multitask.yaml", *columns, *network, *words)
    assert "no label in any of colour, size" in refused.stderr
    lines = [line for line in (photos / "labels.csv").read_text().splitlines() if ",,," not in line]  # neither is known
    table = photos / "some.csv"
    table.write_text("\n".join(lines) + "\n")
    result = last_json(
        tl("train", "--config", "multitask.yaml", *columns, *network, *words, "data.csv.labels=some.csv")
    )
    assert {"colour/top1", "size/top1"} < result["val"].keys()
    assert [*result["search"]["heads"]] == ["colour", "size"]


def test_a_head_without_a_label_in_val_is_named(photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    written(tmp_path, photos, size=lambda row: row["size"] if row["split"] == "train" else "")
    tl_trainer.train(SMALL, data__root=str(tmp_path), train__epochs=1, output__dir=str(tmp_path / "runs"))
    said = "val has no image of 'size=big', 'size=small'; a head's figures are over its other classes, but in macro F1"
    assert any(message.startswith(said) for message in caplog.messages)


def test_the_range_test_trains_all_heads(photos: Path, tmp_path: Path) -> None:
    output = {**SMALL["output"], "dir": str(tmp_path / "runs")}
    assert find_rate(load({**SMALL, "output": output}, [("data.root", str(photos))]))["batches"] == FEWEST
