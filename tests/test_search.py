"""The head that is found: what is compared, what decides, and what a run makes of it."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

import tl_trainer
from conftest import Run, draw_split
from tl_trainer import checkpoint, comparison, logistic, mlp, run, search
from tl_trainer.api import train
from tl_trainer.assembly import Setup, set_up
from tl_trainer.candidates import LINEAR, UNIT, Found, Row
from tl_trainer.cli.train import _report as cli_report
from tl_trainer.comparison import compare
from tl_trainer.config.load import load
from tl_trainer.errors import InputError, Interrupted, RunError
from tl_trainer.features import Features
from tl_trainer.ground.signals import StopRequest
from tl_trainer.logistic import STRENGTHS, Solution, path
from tl_trainer.single_label import SingleLabel
from tl_trainer.tables import FOLDS, SCALINGS, Table, folds_in

CLASSES = 3


def find(train: Table, val: Table, **options: Any) -> Found:
    return compare(train, val, **options).found()


def grouped(setup: Setup) -> Tensor | None:
    """The folds of the training images, for what `search._grouped` reads of their features."""
    split = setup.dataset.split("train")
    features: Any = SimpleNamespace(split=split, targets=torch.tensor(list(split.targets)))
    return search._grouped(setup.parts, features)


def table(count: int, seed: int, noise: float = 1.0, views: int = 1) -> Table:
    """Classes around middles of their own, in features of different scales; each view with its own noise."""
    middles = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % CLASSES
    features = torch.cat([middles[targets] + noise * torch.randn(count, 20, generator=generator) for _ in range(views)])
    targets = targets.repeat(views)
    features = features * torch.logspace(-1, 1, 20) + 1
    return Table(features, targets, functional.one_hot(targets).float(), torch.arange(count).repeat(views))


def logits(found: Found, features: Tensor) -> Tensor:
    [(weight, bias)] = found.layers
    return (functional.normalize(features) if found.unit else features) @ weight.T + bias


@pytest.mark.parametrize("scaling", list(SCALINGS))
def test_with_enough_validation_images_these_decide(scaling: str) -> None:
    train, val = table(150, 1), table(300, 2)
    found = find(train, val, scalings=[scaling])
    assert found.judged == "300 validation images"
    assert found.unit == (scaling == UNIT)
    of_val = logits(found, val.features)
    assert functional.cross_entropy(of_val, val.targets).item() == pytest.approx(found.best.loss, rel=1e-3)
    assert (of_val.argmax(dim=1) == val.targets).double().mean().item() == found.best.top1


@pytest.mark.parametrize("noise", [1.0, 2.5])
def test_the_best_head_is_that_of_scikit_learn(noise: float) -> None:
    train, val = table(150, 1, noise), table(600, 2, noise)
    found = find(train, val, scalings=["standardised"])
    mean, deviation = train.features.mean(dim=0), train.features.std(dim=0, correction=0)
    losses = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=1 / (150 * strength), max_iter=9000, tol=1e-8)
        model.fit(((train.features - mean) / deviation).numpy(), train.targets.numpy())
        shares = torch.from_numpy(model.predict_log_proba(((val.features - mean) / deviation).numpy()))
        losses.append(functional.nll_loss(shares.double(), val.targets).item())
    assert min(row.loss for row in found.rows if row.loss) <= 1.005 * min(losses)


@pytest.mark.parametrize(("drawn", "count"), [(False, 199), (True, 1999)])
def test_with_few_of_them_cross_validation_decides_too(drawn: bool, count: int) -> None:
    train, val = table(60, 1, noise=2, views=2), table(count, 2, noise=2)
    found = find(train, val, scalings=["raw"], drawn=drawn)
    assert found.judged == f"{count:,} validation images and 5-fold cross-validation over train"
    fold = folds_in(train)
    assert torch.equal(fold[:60], fold[60:])  # the views of an image are together
    for number in range(FOLDS):
        counts = torch.bincount(train.targets[fold == number])
        assert (counts == 8).all()
    losses, strength = [], found.best.strength
    for held_out in [fold == number for number in range(FOLDS)]:
        model = LogisticRegression(C=1 / ((~held_out).sum().item() * strength), max_iter=5000, tol=1e-6)
        model.fit(train.features[~held_out].numpy(), train.targets[~held_out].numpy())
        shares = torch.from_numpy(model.predict_log_proba(train.features[held_out].numpy()))
        losses.append(functional.nll_loss(shares.double(), train.targets[held_out], reduction="sum"))
    losses.append(functional.cross_entropy(logits(found, val.features), val.targets, reduction="sum").double())
    assert found.best.loss == pytest.approx(sum(losses).item() / (120 + count), rel=0.01)


def test_among_equals_the_one_that_is_right_most_often_is_chosen() -> None:
    def solved(losses: list[float], top1: float) -> comparison._Solved:
        tensor = torch.tensor(losses)
        return comparison._Solved(Row("", "", 1.0, tensor.mean().item(), top1), tensor, [])

    lowest, equal, worse = solved([0.1, 0.3], 0.5), solved([0.25, 0.2], 0.9), solved([0.5, 0.7], 1.0)
    assert comparison._best([lowest, equal, worse]) is equal
    assert comparison._best([worse, lowest]) is lowest


def test_a_head_that_did_not_converge_or_diverged_is_a_row_that_says_so_and_is_never_chosen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tables = table(60, 1), table(250, 2)
    best = find(*tables, scalings=["raw"]).best

    def spoilt(*args: Any) -> Iterator[Solution]:
        for solution in path(*args):
            if solution.strength == best.strength:
                solution = solution._replace(converged=~solution.converged)
            elif solution.strength == STRENGTHS[3]:
                solution = solution._replace(converged=~solution.converged, point=solution.point * float("nan"))
            yield solution

    monkeypatch.setattr(comparison, "path", spoilt)
    found = find(*tables, scalings=["raw"])
    notes = {row["strength"]: row["note"] for row in csv.DictReader(found.table().splitlines()) if row["note"]}
    assert notes == {str(STRENGTHS[3]): "diverged", str(best.strength): "did not converge"}
    assert found.best.note == ""
    assert found.best.strength != best.strength
    assert not any(row.note for row in found.shown(40))
    assert len(found.curves()["raw"]) == len([row for row in found.rows if row.loss is not None]) - 2
    monkeypatch.undo()
    monkeypatch.setattr(logistic, "PRECISION", -1)
    with pytest.raises(RunError, match=r"none of the heads .* converged; set train\.search=off"):
        find(*tables, scalings=["raw"])


def test_nothing_is_left_to_chance() -> None:
    first, second = (find(table(45, 1), table(30, 2)) for _ in range(2))
    assert first.rows == second.rows
    assert torch.equal(first.layers[0][0], second.layers[0][0])


def test_a_class_of_one_image_and_a_column_of_one_value_are_no_obstacle() -> None:
    train, val = table(20, 1), table(9, 2)
    train.features[:, 3] = 7
    train.targets[train.targets == 2] = 1
    train.targets[-1] = 2
    found = find(train._replace(soft=functional.one_hot(train.targets, 3).float()), val)
    assert found.layers[0][0].isfinite().all()


def killed(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def config(colours: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """A run whose head is found, among few: nothing says how to train it."""
    monkeypatch.setattr(comparison, "STRENGTHS", STRENGTHS[::4])
    return {
        "data": {"root": str(colours)}, "model": {"backbone": "timm/test_resnet", "weights": "none"},
        "transforms": {"train": "eval", "eval": [{"Resize": [64, 64]}]}, "features": {"dir": "cache"},
        "output": {"report": False, "tensorboard": False},
    }  # fmt: skip


def test_a_run_that_says_nothing_of_training_finds_its_head(
    config: dict[str, object], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tl_trainer")
    monkeypatch.setattr(Found, "remark", lambda _: "ridge does better")
    result = train(config, model__backbone="shufflenet_v2_x0_5", output__report=True)
    run_dir = Path(result["run_dir"])
    page = (run_dir / "report" / "report.html").read_text()
    assert "How the head was found" in page
    assert "ridge does better" in page
    assert "ridge does better" in caplog.text
    assert f"{result['search']['candidates']} heads were compared" in page
    assert "Will more photographs help?" in page
    forecast = re.search(r'id="forecast">(.*)</p>', page)
    assert forecast is not None
    assert re.match(r"Twice as many photographs: \d+% expected \(95% interval [\d-]+%\), now \d+%\.$", forecast[1])
    assert (run_dir / "report" / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "report" / "search.png").read_bytes().startswith(b"\x89PNG")
    with (run_dir / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == result["search"]["candidates"] > 3 * 6
    assert result == json.loads((run_dir / "result.json").read_text())
    model = tl_trainer.load(run_dir)
    measured = model.evaluate("val")
    assert {key: measured[key] for key in ("loss", "top1", "n")} == {
        key: result["val"][key] for key in ("loss", "top1", "n")
    }
    saved = checkpoint.load(run_dir / "best.pth")
    assert saved.config["model"]["head"]["normalise"] == ("l2" if result["search"]["scaling"] == UNIT else "none")


@pytest.mark.parametrize("normalise", ["none", "l2"])
def test_a_configured_scaling_is_kept(config: dict[str, object], normalise: str) -> None:
    result = train(config, model__head__normalise=normalise)
    assert (result["search"]["scaling"] == UNIT) == (normalise == "l2")
    [row] = tl_trainer.load(result["run_dir"]).predict(next(Path(str(config["data"]["root"])).rglob("*.jpg")))  # type: ignore[index]
    assert row.error is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"model__head__dropout": 0.1}, "it has dropout"),
        ({"transforms__train": [{"Resize": [64, 64]}, "RandomHorizontalFlip"], "features__cache": "off"}, "not kept"),
    ],
)
def test_where_no_search_is_possible_that_is_said_and_the_head_is_trained(
    config: dict[str, object], words: dict[str, object], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="tl_trainer")
    result = train(config, **words)
    assert "search" not in result
    assert result["epochs"] == 10
    [line] = [
        line
        for line in caplog.text.splitlines()
        if "the head is trained for 10 epochs instead of being searched for: " in line
    ]
    assert said in line


@pytest.mark.parametrize("words", [{"train__epochs": 10}, {"train__optimizer__lr": 0.1}, {"train__search": "off"}])
def test_whoever_says_how_to_train_has_it_trained(config: dict[str, object], words: dict[str, object]) -> None:
    assert "search" not in train(config, **words)


def test_a_search_that_was_killed_is_resumed_to_the_same_head(
    config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(config)
    with monkeypatch.context() as patch:
        patch.setattr(run, "search", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, output__dir="again")
    resumed = train(config, output__dir="again", resume=True)
    assert resumed["search"] == whole["search"]
    first, second = (checkpoint.load(Path(result["checkpoint"])).trained for result in (whole, resumed))
    for name, value in first.items():
        assert torch.equal(value, second[name])


@pytest.mark.parametrize("hidden", [[], [4]])
def test_a_search_that_was_killed_amid_its_candidates_is_resumed_to_the_same_bytes(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hidden: list[int]
) -> None:
    monkeypatch.setattr(mlp, "STEPS", 1)
    config["model"]["head"] = {"hidden": hidden}
    config["features"]["dir"] = str(tmp_path / "cache")
    pause, calls = run._pause, iter(range(7))

    def killing(*arguments: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        pause(*arguments)

    for name in ("whole", "killed"):
        Path(name).mkdir()
    monkeypatch.chdir("whole")
    whole = train(config)
    monkeypatch.chdir("../killed")
    with monkeypatch.context() as patch:
        patch.setattr(run, "_pause", killing)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert next(calls, "all") == "all"
    assert not Path("runs/run-1/search.csv").exists()
    assert train(config, resume=True)["search"] == whole["search"]
    for name in ("best.pth", "search.csv", "config.yaml"):
        assert Path("runs/run-1", name).read_bytes() == Path("../whole/runs/run-1", name).read_bytes()


def test_the_command_prints_what_was_found(tl: Run, tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 6)
    words = ("model.backbone=timm/test_resnet", "model.weights=none", "transforms.eval=[{Resize: [64, 64]}]")
    result = tl("train", tmp_path / "photos", *words, "output.report=false", "output.tensorboard=false")
    assert result.returncode == 0, result.stderr
    assert "best of " in result.stdout
    assert "logistic regression" in result.stderr


@pytest.mark.parametrize("hidden", [[], [4]])
def test_a_run_that_was_killed_in_the_report_finds_the_same_among_as_many(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, hidden: list[int]
) -> None:
    monkeypatch.setattr(mlp, "STEPS", 1)
    config["model"]["head"] = {"hidden": hidden}
    whole = train(config)
    with monkeypatch.context() as patch:
        patch.setattr(run, "conclude", killed)
        with pytest.raises(Interrupted):
            train(config, output__dir="again")
    written = Path("again/run-1/config.yaml").read_text()
    resumed = train(resume="again/run-1")
    assert resumed["search"] == whole["search"]
    assert Path("again/run-1/config.yaml").read_text() == written
    assert len(Path("again/run-1/metrics.csv").read_text().splitlines()) == 2
    with pytest.raises(InputError, match="its head was found by the search; start a new run to train one"):
        train(resume="again/run-1")
    assert train(config, output__dir="again", resume=True) == resumed


def test_a_head_that_is_being_trained_is_not_searched_for_after_a_resume(
    config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = StopRequest()
    with monkeypatch.context() as patch:
        patch.setattr(search, "views_that_fit", lambda *_: 0)
        patch.setattr(SingleLabel, "better", lambda *_: setattr(stop, "signal", 2) or False)
        with pytest.raises(Interrupted):
            train(config, stop=stop)
    resumed = train(config, resume=True)
    assert "search" not in resumed
    assert resumed["epochs"] == 10


def test_a_search_that_cannot_be_repeated_is_no_training(
    config: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(run, "conclude", killed)
        with pytest.raises(Interrupted):
            train(config)
    monkeypatch.setattr(search, "views_that_fit", lambda *_: 0)
    with pytest.raises(RunError, match=r"run-1: the search cannot be repeated here; what it found is in best\.pth"):
        train(config, resume=True)


def test_features_that_are_not_finite_are_named(config: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    take = Features.take
    monkeypatch.setattr(Features, "take", lambda self, *which: take(self, *which) * float("inf"))
    with pytest.raises(RunError, match="the features of the train images are not finite or too large"):
        train(config)


def test_an_image_alone_in_its_class_judges_no_head_without_the_class() -> None:
    train_, val = table(61, 1), table(30, 2)
    train_.targets[-1] = CLASSES
    alone = train_._replace(soft=functional.one_hot(train_.targets).float())
    assert comparison._judged(alone, folds_in(alone)).tolist() == list(range(60))
    found = find(alone, val, scalings=["raw"])
    assert found.best.loss is not None
    assert found.best.loss < 0.5


def test_folds_that_are_given_are_taken() -> None:
    train_, val = table(60, 1, noise=2, views=2), table(30, 2, noise=2)
    drawn = find(train_, val, scalings=["raw"])
    given = find(train_, val, scalings=["raw"], folds=folds_in(train_)[:60])
    assert given.rows == drawn.rows
    thirds = find(train_, val, scalings=["raw"], folds=torch.arange(60) // CLASSES % 3)
    assert thirds.judged == "30 validation images and 3-fold cross-validation over train"
    assert thirds.rows != drawn.rows
    none = find(train_, val, scalings=["raw"], folds=torch.full((60,), FOLDS))
    assert none.judged == "30 validation images"


def test_groups_are_not_divided_by_the_folds_of_a_search(
    config: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    setup = set_up(load(config, [("data.group_pattern", "([0-9])[.]jpg")]))
    split, folds = setup.dataset.split("train"), grouped(setup)
    assert folds is not None
    assert len({*zip(split.groups, folds.tolist(), strict=True)}) == len({*split.groups}) > 1
    caplog.set_level("INFO")
    setup.dataset.splits["train"] = replace(split, groups=["a"] * len(split))
    folds = grouped(setup)
    assert folds is not None
    assert (folds == FOLDS).all()
    assert caplog.messages[-1].endswith(
        "have too few groups for cross-validation, so the val images alone choose the head"
    )


def test_a_class_that_is_copies_of_one_image_judges_no_head() -> None:
    train_ = table(60, 1)
    fold = folds_in(train_)
    fold[train_.labels == 0] = 1
    assert comparison._judged(train_, fold).tolist() == (train_.labels != 0).nonzero()[:, 0].tolist()


def test_copies_are_not_divided_by_the_folds_of_a_search(config: dict[str, object]) -> None:
    setup = set_up(load(config))
    split = setup.dataset.split("train")
    assert grouped(setup) is None
    setup.dataset.splits["train"] = replace(split, hashes=[split.hashes[index // 2] for index in range(len(split))])
    folds = grouped(setup)
    assert folds is not None
    assert torch.equal(folds[: len(folds) // 2 * 2 : 2], folds[1::2])


def test_a_head_with_hidden_layers_is_found_among_48(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "STEPS", 1)
    result = train(config, model__head={"hidden": [4], "normalise": "l2"})
    assert result["search"]["method"] == "MLP 4"
    with (Path(result["run_dir"]) / "search.csv").open() as file:
        rows = list(csv.DictReader(file))
    settings = {(row["rate"], row["strength"], row["dropout"]) for row in rows if row["method"] == "MLP 4"}
    assert len(settings) == 48
    assert any(row["method"] == LINEAR for row in rows)
    measured = tl_trainer.load(result["run_dir"]).evaluate("val")
    assert measured["loss"] == pytest.approx(result["val"]["loss"], abs=1e-6)
    assert measured["loss"] == pytest.approx(result["search"]["loss"], abs=1e-4)
    saved = checkpoint.load(Path(result["checkpoint"]))
    assert saved.config["model"]["head"] == {"hidden": [4], "dropout": 0.0, "normalise": "l2"}


def test_a_configured_dropout_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlp, "STEPS", 1)
    monkeypatch.setattr(mlp, "ROUNDS", 1)
    found = comparison.find_mlp(table(60, 1), table(30, 2), mlp.Plan([5], 20, 0), [0.3])
    assert {row.dropout for row in found.rows if row.rate} == {0.3}


def test_a_head_is_solved_again_on_train_and_val_and_judged_by_heads_that_did_not_see_the_image() -> None:
    train_, val = table(60, 1, noise=2, views=2), table(45, 2, noise=2)
    found = find(train_, val, scalings=["raw"])
    refitted = comparison.refitted(found, train_, val, lambda: None)
    features = torch.cat([train_.features[:60], val.features, train_.features[60:]])
    targets = torch.cat([train_.targets[:60], val.targets, train_.targets[60:]])
    images = torch.cat([torch.arange(105), torch.arange(60)])
    fold = folds_in(Table(features, targets, functional.one_hot(targets).float(), images))

    def of_scikit_learn(rows: Tensor) -> Any:
        model = LogisticRegression(C=1 / (rows.sum().item() * found.best.strength), max_iter=5000, tol=1e-7)
        return model.fit(features[rows].numpy(), targets[rows].numpy())

    shares = of_scikit_learn(fold < FOLDS).predict_proba(val.features.numpy())
    torch.testing.assert_close(
        logits(refitted, val.features).softmax(dim=1), torch.from_numpy(shares).float(), atol=0.02, rtol=0
    )
    assert refitted.held_out is not None
    for number in range(FOLDS):
        shares = of_scikit_learn(fold != number).predict_proba(val.features[fold[60:105] == number].numpy())
        held_out = refitted.held_out[fold[60:105] == number].softmax(dim=1)
        torch.testing.assert_close(held_out, torch.from_numpy(shares).float(), atol=0.02, rtol=0)


def test_a_run_with_refit_says_where_its_val_figures_are_from(
    config: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain, result = train(config), train(config, train__refit=True, output__report=True)
    assert (plain["search"]["refit"], result["search"]["refit"]) == (False, True)
    assert plain["search"]["loss"] == result["search"]["loss"]
    assert "from\ncross-validation" in Path(result["report"]).read_text()
    assert "the val figures are from cross-validation" in cli_report(result)
    assert "cross-validation" not in cli_report(plain)
    measured = tl_trainer.load(result["run_dir"]).evaluate("val")
    assert measured["loss"] < result["val"]["loss"]
    assert "the head was solved on these images too (train.refit)" in caplog.text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"train__epochs": 3}, "refit is for a head that is found"),
        ({"model__head__hidden": [4]}, r"train\.refit.*the head is not linear"),
        ({"model__trainable": "layer4"}, r"train\.refit.*stages of the backbone train"),
        ({"features__cache": "off"}, r"train\.refit.*features\.cache is off"),
    ],
)
def test_refit_is_refused_where_no_linear_head_is_found(
    config: dict[str, Any], words: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        train(config, train__refit=True, **words)
    assert not Path("runs").exists() or not list(Path("runs").iterdir())


@pytest.mark.parametrize("hidden", [[], [4]])
def test_two_runs_write_the_same_bytes(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch, hidden: list[int]
) -> None:
    monkeypatch.setattr(mlp, "STEPS", 1)
    config["model"]["head"] = {"hidden": hidden}
    torch.rand(7)
    first, second = (Path(train(config)["run_dir"]) for _ in range(2))
    for name in ("best.pth", "search.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
