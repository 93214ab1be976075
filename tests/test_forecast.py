"""Will more photographs help: the curve, the law fitted to it, and what it says of twice as many images."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import curve_fit
from sklearn.linear_model import LogisticRegression
from torch.nn import functional

from conftest import draw_split
from tl_trainer import forecast, logistic
from tl_trainer.candidates import Row
from tl_trainer.config.data import DataSection
from tl_trainer.data.dataset import Dataset
from tl_trainer.data.sources import open_dataset
from tl_trainer.forecast import Curve, Forecast, fitted, forecast_of, measured
from tl_trainer.tables import Table

WIDTH = 24


def table(count: int, seed: int, classes: int, apart: float, wrong: float = 0.0) -> Table:
    """Normal classes around middles of their own; a share of the labels is drawn."""
    middles = apart * torch.randn(classes, WIDTH, generator=torch.Generator().manual_seed(7)) / WIDTH**0.5
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % classes
    features = middles[targets] + torch.randn(count, WIDTH, generator=generator)
    drawn = torch.randint(classes, (count,), generator=generator)
    targets = torch.where(torch.rand(count, generator=generator) < wrong, drawn, targets)
    return Table(features, targets, functional.one_hot(targets, classes).float(), torch.arange(count))


def head(strength: float, scaling: str = "raw") -> Row:
    return Row("logistic regression", scaling, strength, 0.0, 0.0)


SETS = {
    "two classes": (240, (2, 2.5, 0.0), 0.03),
    "ten classes": (400, (10, 4.2, 0.0), 0.01),
    "labels in doubt": (300, (4, 4.0, 0.1), 0.03),
}


def truth(images: int, kind: tuple[int, float, float], strength: float) -> float:
    """The accuracy of scikit-learn's heads for so many images on fresh ones; C as the prior at half of them."""
    fresh, model = table(8000, 3, *kind), LogisticRegression(C=2 / (images * strength), max_iter=500)
    sets = (table(images, seed, *kind) for seed in range(10, 16))
    fits = (model.fit(drawn.features.numpy(), drawn.targets.numpy()) for drawn in sets)
    return float(np.mean([fit.score(fresh.features.numpy(), fresh.targets.numpy()) for fit in fits]))


def found(images: int, validation: int, seed: int, kind: tuple[int, float, float], strength: float) -> Forecast:
    forecast = forecast_of(table(images, seed, *kind), table(validation, seed + 1, *kind), head(strength))
    assert isinstance(forecast, Forecast), forecast
    return forecast


@pytest.mark.parametrize("name", SETS)
def test_the_forecast_is_within_two_points_of_the_truth(name: str) -> None:
    images, kind, strength = SETS[name]
    said = found(images, 3000, 1, kind, strength)
    expected = truth(2 * images, kind, strength)
    assert said.accuracy(2 * images) == pytest.approx(expected, abs=0.02)
    assert said.accuracy(images) < expected


def test_the_interval_holds_the_truth_in_most_of_many_sets() -> None:
    """With few validation images, so that images that were left out judge too."""
    images, kind, strength = SETS["two classes"]
    expected = truth(2 * images, kind, strength)
    intervals = [found(images, 150, seed, kind, strength).interval for seed in range(100, 124, 2)]
    assert sum(low <= expected <= high for low, high in intervals) >= 10
    assert all(high - low < 0.15 for low, high in intervals)


@pytest.mark.parametrize(("scale", "exponent", "floor"), [(0.9, 0.5, 0.05), (2.0, 1.0, 0.0), (0.4, 0.25, 0.1)])
def test_the_law_is_that_of_scipys_least_squares(scale: float, exponent: float, floor: float) -> None:
    sizes = [30, 60, 120, 210, 300]
    exact = scale * torch.tensor(sizes, dtype=torch.float64) ** -exponent + floor
    law = fitted(sizes, exact[None])
    assert [part.item() for part in law] == pytest.approx([scale, exponent, floor], abs=1e-9)
    noisy = exact + 0.003 * torch.tensor([1.0, -1.0, 0.5, 1.0, -1.0])
    reference, _ = curve_fit(lambda n, *abc: abc[0] * n ** -abc[1] + abc[2], sizes, noisy.numpy(),
                             (scale, exponent, floor), bounds=((0, 0.1, 0), (9, 1.5, 1)))  # fmt: skip
    expected = reference[0] * 600 ** -reference[1] + reference[2]
    assert fitted(sizes, noisy[None])(600).item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("errors", [[0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.02, 0.001]], ids=["rising", "below zero"])
def test_no_law_rises_or_goes_below_zero(errors: list[float]) -> None:
    law = fitted([10, 20, 40, 80], torch.tensor([errors], dtype=torch.float64))
    assert law.scale >= 0
    assert law.floor >= 0
    assert 0 <= law(160).item() <= law(80).item()


def test_a_heads_own_images_never_judge_it_and_each_class_keeps_its_share() -> None:
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    for draw in range(3):
        places = forecast._places(labels, draw)
        assert sorted(places.tolist()) == list(range(100))
        for count in (10, 40, 80):
            shares = torch.bincount(labels[places < count], minlength=3) / count
            assert shares.tolist() == pytest.approx([0.6, 0.3, 0.1], abs=0.1)
    train, val = table(100, 1, 3, 3.0), table(50, 2, 3, 3.0)
    curve = measured(train, val, head(0.03), left_out=True)
    assert curve is not None
    assert curve.sizes == [8, 16, 32, 56, 80]
    of_val, of_train = curve.judges[:, :50], curve.judges[:, 50:]
    assert of_val.all()
    assert of_train.sum(dim=1).tolist() == [20] * 5
    places = torch.stack([forecast._places(train.labels, draw) for draw in range(5)])
    assert torch.equal(of_train.bool(), places >= curve.sizes[-1])


@pytest.mark.parametrize("scaling", ["raw", "length 1"])
def test_the_errors_are_those_of_scikit_learns_heads(scaling: str) -> None:
    train, val = table(120, 1, 3, 3.0), table(300, 2, 3, 3.0)
    curve = measured(train, val, head(0.02, scaling), left_out=False)
    assert curve is not None
    assert curve.judges.shape == (5, 300)
    assert curve.of_draws[-1].unique().numel() == 1  # all images: one head
    places = forecast._places(train.labels, 4)
    features = [functional.normalize(x) if scaling == "length 1" else x for x in (train.features, val.features)]
    for number, size in enumerate(curve.sizes):
        chosen = places < size
        model = LogisticRegression(C=1 / (120 * 0.02), max_iter=2000, tol=1e-8)
        model.fit(features[0][chosen].numpy(), train.targets[chosen].numpy())
        error = 1 - model.score(features[1].numpy(), val.targets.numpy())
        assert curve.of_draws[number, 4].item() == pytest.approx(error, abs=0.0034)


def test_the_views_of_an_image_are_drawn_together() -> None:
    train, val = table(60, 1, 3, 3.0), table(200, 2, 3, 3.0)
    twice = Table(*(torch.cat([column, column]) for column in train))
    once, doubled = (measured(each, val, head(0.02), left_out=True) for each in (train, twice))
    assert once is not None
    assert doubled is not None
    assert doubled.sizes == once.sizes
    assert (doubled.of_draws - once.of_draws).abs().max() < 0.006


def test_large_sets_are_drawn_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "WORK", 2 * 120 * WIDTH * 3)
    said = forecast_of(table(120, 1, 3, 2.0), table(250, 2, 3, 2.0), head(0.02))
    assert isinstance(said, Forecast)
    assert said.curve.judges.shape == (2, 250)
    assert said.how == (
        "The head was solved again on 12, 24, 48, 84 and 120 training images, drawn 2 times, and judged by 250 "
        "validation images."
    )


def test_the_sentence_says_twice_and_now() -> None:
    law = fitted([100, 200, 400, 800], torch.tensor([[0.5, 0.25, 0.125, 0.0625]], dtype=torch.float64))
    said = Forecast(Curve([100], torch.ones(1, 1, 1), torch.ones(1, 1)), law, 500, (0.931, 0.962), "")
    assert said.sentence == "Twice as many photographs: 95% expected (95% interval 93-96%), now 90%."


@pytest.mark.parametrize(
    ("images", "classes", "apart", "why"),
    [
        (13, 3, 2.0, "13 training images of 3 classes are too few for a forecast."),
        (
            300,
            2,
            90.0,
            "Every image that the heads were judged by is classified correctly, so no improvement can be measured.",
        ),
    ],
)
def test_where_there_is_no_forecast_a_sentence_says_why(images: int, classes: int, apart: float, why: str) -> None:
    assert forecast_of(table(images, 1, classes, apart), table(200, 2, classes, apart), head(0.001)) == why


def test_a_head_that_does_not_converge_makes_no_curve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logistic, "ITERATIONS", 1)
    said = forecast_of(table(120, 1, 3, 2.0), table(200, 2, 3, 2.0), head(0.0001))
    assert said == "The head does not converge on fewer training images, so there is no forecast."


def test_groups_which_its_curve_would_divide_have_none(tmp_path: Path) -> None:
    draw_split(tmp_path / "photos", 2)
    dataset = open_dataset(DataSection(root=str(tmp_path / "photos"), group_pattern="/0([0-9])"))
    setup: Any = SimpleNamespace(dataset=Dataset(dataset.classes, {"train": dataset.split("all")}, "photos"))
    said = forecast.forecast(setup, {}, head(0.001))
    assert said == "There is no forecast for images in groups, since its subsets would divide them."
