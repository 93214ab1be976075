"""Cross-validation of the head that is found: what decides, what is written, what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import t as student
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from torch.nn import functional

import tl_trainer
from conftest import Run, draw_split, last_json, load_script
from tl_trainer import cross_validation
from tl_trainer.cross_validation import COARSE, WIDER, interval, out_of_fold
from tl_trainer.errors import ConfigError, DataError, InputError, RunError
from tl_trainer.features import Features
from tl_trainer.logistic import Axes, path
from tl_trainer.metrics import wilson
from tl_trainer.tables import SCALINGS, Table

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench_folds.py"
FOLDS, CLASSES = 5, 3
pytestmark = pytest.mark.usefixtures("own_logging")


def table(count: int, seed: int = 0, views: int = 1) -> Table:
    """Classes that overlap, spread evenly over the images."""
    generator = torch.Generator().manual_seed(seed)
    middles = torch.randn(CLASSES, 8, generator=torch.Generator().manual_seed(0))
    targets = (torch.arange(count) % CLASSES).repeat(views)
    features = middles[targets] + 1.2 * torch.randn(count * views, 8, generator=generator)
    return Table(features, targets, functional.one_hot(targets).float(), torch.arange(count).repeat(views))


in_fold = torch.arange(90) // CLASSES % FOLDS


def test_each_image_is_judged_by_the_head_that_scikit_learn_finds_without_its_fold() -> None:
    train = table(90)
    logits, choices = out_of_fold(train, train.features, in_fold, ["raw"])
    assert [choice.scaling for choice in choices] == ["raw"] * FOLDS
    for number, choice in enumerate(choices):
        inside = in_fold != number
        model = LogisticRegression(C=1 / (inside.sum().item() * choice.strength), max_iter=9000, tol=1e-8)
        model.fit(train.features[inside].numpy(), train.targets[inside].numpy())
        expected = torch.from_numpy(model.predict_proba(train.features[~inside].numpy())).float()
        torch.testing.assert_close(logits[~inside].softmax(dim=1), expected, atol=5e-3, rtol=0)


def test_the_choice_is_that_of_heads_which_saw_neither_fold() -> None:
    train = table(90)
    _, choices = out_of_fold(train, train.features, in_fold, ["raw"])
    total = torch.zeros(len(COARSE))
    for other in range(1, FOLDS):
        share = ((in_fold != 0) & (in_fold != other)).float()[None]
        for index, solution in enumerate(path(Axes.of(train.features), train.soft, share, COARSE)):
            weight, bias = solution.head()
            of_rows = train.features[in_fold == other] @ weight.T + bias
            total[index] += functional.cross_entropy(of_rows, train.targets[in_fold == other], reduction="sum")
    losses = total / (in_fold != 0).sum()
    assert choices[0].strength == COARSE[int(losses.argmin())]
    assert choices[0].loss == pytest.approx(losses.min().item(), rel=1e-3)


def test_the_labels_of_a_fold_decide_nothing_of_its_head() -> None:
    train = table(90)
    logits, choices = out_of_fold(train, train.features, in_fold, [*SCALINGS])
    targets = torch.where(in_fold == 2, (train.targets + 1) % CLASSES, train.targets)
    other = train._replace(targets=targets, soft=functional.one_hot(targets).float())
    again, chosen = out_of_fold(other, train.features, in_fold, [*SCALINGS])
    assert (chosen[2], torch.equal(again[in_fold == 2], logits[in_fold == 2])) == (choices[2], True)
    assert not torch.equal(again[in_fold == 0], logits[in_fold == 0])


def test_all_views_of_an_image_are_in_its_fold_and_the_evaluated_one_is_judged() -> None:
    train = table(90, views=2)
    judged = table(90, seed=5).features
    logits, choices = out_of_fold(train, judged, in_fold, ["standardised"])
    inside = (in_fold != 1).repeat(2)
    scaling = SCALINGS["standardised"](train.features)
    model = LogisticRegression(C=1 / (inside.sum().item() * choices[1].strength), max_iter=9000, tol=1e-8)
    model.fit(scaling(train.features)[inside].numpy(), train.targets[inside].numpy())
    expected = torch.from_numpy(model.predict_proba(scaling(judged)[in_fold == 1].numpy())).float()
    torch.testing.assert_close(logits[in_fold == 1].softmax(dim=1), expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize(("folds", "images", "most"), [(10, 3000, 10), (10, 244, 45), (3, 30, 3), (5, 600, 10)])
def test_few_pairs_of_folds_judge_where_these_are_large(folds: int, images: int, most: int) -> None:
    pairs = cross_validation._pairs(folds, images)
    assert len(pairs) == len({*pairs}) == most
    assert {number for pair in pairs for number in pair} == {*range(folds)}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """Twelve photographs of each class, no splits, and a backbone that takes milliseconds."""
    draw_split(tmp_path / "photos", 12)
    return {
        "data": {"root": str(tmp_path / "photos")},
        "transforms": {"train": "eval", "eval": [{"Resize": [64, 64]}]},
        "model": {"backbone": "timm/test_resnet", "weights": "none"},
        "train": {"precision": "fp32"},
    }


def test_what_is_written(config: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    result = tl_trainer.cross_validate(config, folds=4)
    folder = Path(result["folder"])
    assert folder == Path("runs/run-folds-1")
    assert sorted(path.name for path in folder.iterdir()) == ["folds.json", "per_class.csv", "predictions.csv"]
    written = json.loads((folder / "folds.json").read_text())
    assert written == result
    assert (result["images"], result["no_part"], result["n"]) == (36, [], 36)
    assert [fold["images"] for fold in result["folds"]] == [9] * 4
    assert sum(fold["top1"] for fold in result["folds"]) / 4 == pytest.approx(result["top1"])
    assert result["top1_interval"] == wilson(result["top1"], int(36 / WIDER**2))
    rows = list(csv.DictReader((folder / "predictions.csv").read_text().splitlines()))
    assert {row["path"] for row in rows} == {
        f"{name}/{n:02}.jpg" for name in ("blue", "green", "red") for n in range(12)
    }
    assert sum(row["label"] == row["predicted"] for row in rows) / 36 == result["top1"]
    assert [*rows[0]][:4] == ["path", "label", "predicted", "probability"]


def test_the_folds_are_scikit_learns_and_of_the_seed(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = cross_validation.out_of_fold
    monkeypatch.setattr(
        cross_validation, "out_of_fold", lambda *args: seen.append((args[0].targets, args[2])) or original(*args)
    )
    tl_trainer.cross_validate(config, folds=4, seed=7)
    (targets, fold), *_ = seen
    parts = StratifiedKFold(4, shuffle=True, random_state=7).split(targets, targets)
    for number, (_, held_out) in enumerate(parts):
        assert (fold == number).nonzero()[:, 0].tolist() == held_out.tolist()


def test_a_val_split_of_its_own_takes_no_part(
    config: dict[str, Any], colours: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    result = tl_trainer.cross_validate(config, folds=4, data__root=str(colours))
    assert (result["images"], result["no_part"]) == (24, ["val"])
    assert "the source's own val images take no part in the cross-validation" in caplog.messages


def test_the_command_tells_it(config: dict[str, Any], tl: Run, tmp_path: Path) -> None:
    words = ["model.backbone=timm/test_resnet", "model.weights=none", "transforms.eval=[{Resize: [64, 64]}]"]
    command = ["train", tmp_path / "photos", "--folds", 4, *words]
    result = tl(*command)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].startswith("4-fold cross-validation of 36 images; ")
    assert lines[2:4] == ["recall of each class:", *(line for line in lines if line.endswith(" of 12"))][:2]
    assert lines[-1] == "no classifier was trained: the same command without --folds trains one"
    assert max(map(len, lines[:-2])) <= 80
    assert not list(Path("runs").glob("*/best.pth"))
    assert last_json(tl(*command, "--json"))["top1_interval"]


@pytest.mark.parametrize(
    ("folds", "overrides", "message"),
    [
        (2, {}, "--folds 2: 3 or more are needed; 10 is usual"),
        (4, {"model__trainable": "layer4"}, "model.trainable: .*of a frozen backbone; set it to head"),
        (4, {"model__head__hidden": [8]}, "model.head: .*a single Linear; leave out hidden and dropout"),
        (4, {"train__epochs": 3}, "train.search: .*set train.search=auto, also where epochs"),
        (4, {"train__phases": [{"trainable": "head", "epochs": 1}]}, r"train.phases: .*set train.phases=\[\]"),
        (4, {"features__cache": "off"}, "features.cache: .*set it to auto"),
        (13, {}, r"13 folds need 13 images of each class or more, .* fewer of 'blue' \(12\), 'green' \(12\)"),
    ],
)
def test_what_is_refused_before_an_image_is_read(
    config: dict[str, Any], folds: int, overrides: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tl_trainer.data.verify.verified", None)
    with pytest.raises((InputError, ConfigError, DataError), match=message):
        tl_trainer.cross_validate(config, folds=folds, **overrides)


def test_random_views_that_are_not_kept_are_refused(config: dict[str, Any]) -> None:
    random = {"transforms__train": ["RandomHorizontalFlip", {"Resize": [64, 64]}], "features__views": 1}
    with pytest.raises(RunError, match=r"set transforms.train=eval, or features.views to 2 or more"):
        tl_trainer.cross_validate(config, folds=4, **random)


def test_features_that_are_not_finite_are_named(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    take = Features.take
    monkeypatch.setattr(Features, "take", lambda self, *which: take(self, *which) * float("inf"))
    with pytest.raises(RunError, match=r"features of the images are not finite; set train.precision=fp32"):
        tl_trainer.cross_validate(config, folds=4)


def test_neither_resume_nor_a_dry_run(tl: Run, config: dict[str, Any], tmp_path: Path) -> None:
    for flag in ("--resume", "--dry-run"):
        result = tl("train", tmp_path / "photos", "--folds", 4, flag)
        assert (result.returncode, "--folds trains no run; leave out --resume and --dry-run" in result.stderr) == (
            2,
            True,
        )


def test_no_group_is_divided_and_the_interval_counts_groups(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = cross_validation.out_of_fold
    monkeypatch.setattr(cross_validation, "out_of_fold", lambda *args: seen.append(args[2]) or original(*args))
    pattern = r"(?P<group>\d)[.]jpg"  # of 00 to 11: ten groups, of which two have two images of each class
    result = tl_trainer.cross_validate(config, folds=3, data__group_pattern=pattern)
    rows = csv.DictReader(Path(result["predictions"]).read_text().splitlines())
    folds: dict[str, set[int]] = {}
    for row, of in zip(rows, seen[0].tolist(), strict=True):
        folds.setdefault(row["path"][-5], set()).add(of)
    assert sorted(map(len, folds.values())) == [1] * 10
    assert {of for found in folds.values() for of in found} == {0, 1, 2}


def test_images_of_a_group_count_as_the_independent_ones_that_they_are() -> None:
    right = torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.8
    alone = interval(right, [*map(str, range(300))])
    assert alone == pytest.approx(interval(right), abs=2e-3)
    five = interval(right.repeat(5), [*map(str, range(300))] * 5)
    assert five == pytest.approx(alone, abs=1e-12)
    few = 40 * (1.959964 / student.ppf(0.975, 39)) ** 2
    assert interval(torch.ones(80, dtype=torch.bool), [*map(str, range(40))] * 2) == wilson(1.0, int(few / WIDER**2))


@pytest.mark.slow
def test_the_interval_holds_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    assert load_script(SCRIPT).coverage(100) >= 0.9
