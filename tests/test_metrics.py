"""Figures over a split against scikit-learn's on random and degenerate inputs; calibration; class weights."""

from __future__ import annotations

import json
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import binomtest
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_calibration_error

from tl_trainer import metrics
from tl_trainer.errors import RunError
from tl_trainer.metrics import (
    AT_ONCE,
    BINS,
    HIGHEST,
    LOWEST,
    PAIRS,
    Scores,
    best_classes,
    class_weights,
    confusion,
    figures,
    fit_temperature,
    measure,
    probabilities,
    ranked,
    reliability,
    wilson,
)


def scores(count: int, classes: int, scale: float = 1.0) -> Scores:
    """Logits (count, classes), half of them right more often than not, and targets (count,)."""
    generator = torch.Generator().manual_seed(100 * count + classes)
    targets = torch.randint(0, classes, (count,), generator=generator)
    targets[:classes] = torch.arange(classes)[:count]  # each class at least once
    logits = torch.randn(count, classes, generator=generator)
    return Scores(scale * (logits + 1.5 * functional.one_hot(targets, classes)), targets)


def names(count: int) -> list[str]:
    return [f"class {index}" for index in range(count)]


def measured(given: Scores, temperature: float | None = None, withheld: str | None = None) -> dict[str, Any]:
    return measure(given, names(given.logits.shape[1]), temperature, withheld)


@st.composite
def any_scores(draw: st.DrawFn) -> Scores:
    """Few or many images, classes that are absent or never predicted, one class only, ties, certainty."""
    classes, count = draw(st.integers(2, 8)), draw(st.integers(1, 40))
    targets = draw(st.lists(st.integers(0, draw(st.integers(0, classes - 1))), min_size=count, max_size=count))
    values = st.floats(-30, 30, width=32) | st.sampled_from([0.0, 1.0, -80.0, 80.0])
    logits = draw(st.lists(values, min_size=count * classes, max_size=count * classes))
    return Scores(torch.tensor(logits).view(count, classes), torch.tensor(targets))


@settings(max_examples=150, deadline=None)
@given(any_scores())
def test_every_figure_is_scikit_learns(given: Scores) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no storm of warnings about classes that are never predicted
        found = measured(given)
    labels, predicted = given.targets.numpy(), ranked(given.logits, 1)[:, 0].numpy()
    classes = given.logits.shape[1]
    shares = given.logits.double().softmax(dim=1).numpy()
    near = pytest.approx
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's own about classes that are never predicted
        assert found["top1"] == near(accuracy_score(labels, predicted), abs=1e-6)
        assert found["balanced_accuracy"] == near(balanced_accuracy_score(labels, predicted), abs=1e-6)
        assert found["loss"] == near(_nll(given), rel=1e-6, abs=1e-6)
        expected = confusion_matrix(labels, predicted, labels=range(classes))
        assert confusion(given, classes).among(torch.arange(classes)).tolist() == expected.tolist()
        for average in ("macro", "weighted"):
            expected = precision_recall_fscore_support(labels, predicted, average=average, zero_division=0)[:3]
            assert list(found[average].values()) == near(list(expected), abs=1e-6)
        per_class = precision_recall_fscore_support(labels, predicted, labels=range(classes), zero_division=0)
        calibration = found["calibration"]["before"]
        assert calibration["nll"] == near(_nll(given), rel=1e-6, abs=1e-6)
        expected_brier = brier_score_loss(np.eye(classes)[labels], shares, scale_by_half=False)
        assert calibration["brier"] == near(expected_brier, abs=1e-6)
    for index, row in enumerate(found["per_class"]):
        assert row["support"] == per_class[3][index]
        defined = {"precision": row["support"] or row["predicted"], "recall": row["support"]}
        defined["f1"] = defined["precision"]
        for key, values in zip(("precision", "recall", "f1"), per_class[:3], strict=True):
            assert row[key] == (near(values[index], abs=1e-6) if defined[key] else None)
        assert (f"per_class class {index} recall" in found["undefined"]) == (not row["support"])
    json.dumps(found, allow_nan=False)


def _nll(given: Scores) -> float:
    """In extended precision: scikit-learn's log_loss clips what is all but impossible."""
    logits = given.logits.numpy().astype(np.longdouble)
    logits = logits - logits.max(axis=1, keepdims=True)
    right = logits[np.arange(len(logits)), given.targets.numpy()]
    return float((np.log(np.exp(logits).sum(axis=1)) - right).mean())


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 102])
def test_headline_figures_are_scikit_learns(classes: int) -> None:
    given = scores(250, classes)
    found = figures(given)
    labels, shares = range(classes), given.logits.double().softmax(dim=1).numpy()
    assert found["n"] == 250
    assert found["loss"] == pytest.approx(log_loss(given.targets, shares, labels=labels), rel=1e-6)
    assert found["top1"] == accuracy_score(given.targets, given.logits.argmax(dim=1))
    assert 0.1 < found["top1"] < 0.99
    if classes > 5:
        assert found["top5"] == top_k_accuracy_score(given.targets, shares, k=5, labels=labels)
        assert found["top1"] < found["top5"] < 1
    else:
        assert found["top5"] == 1.0


def test_no_image_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no image"):
        figures(Scores(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)))


def test_the_lower_index_wins_a_tie() -> None:
    assert ranked(torch.tensor([[1.0, 5.0, 5.0, 0.0, 5.0]]), 9).tolist() == [[1, 2, 4, 0, 3]]


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 9), (9, 9), (1, 2), (83, 97), (500, 1000), (5, 100_000)])
def test_the_interval_is_wilsons(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert wilson(hits / n, n) == pytest.approx([expected.low, expected.high], abs=1e-9)
    assert 0 <= wilson(hits / n, n)[0] <= hits / n <= wilson(hits / n, n)[1] <= 1


@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
@pytest.mark.parametrize("temperature", [None, 0.5, 3.0])
def test_the_calibration_error_is_torchmetrics(scale: float, temperature: float | None) -> None:
    given = scores(300, 7, scale)
    calibration = measured(given, temperature)["calibration"]
    expected = multiclass_calibration_error(probabilities(given.logits, temperature), given.targets, 7, n_bins=BINS)
    assert calibration["after"]["ece"] == pytest.approx(expected.item(), abs=1e-6)
    assert (calibration["after"] == calibration["before"]) == (temperature is None)


def test_the_bins_hold_every_image_once() -> None:
    given = Scores(torch.tensor([[0.0, 0.0], [90.0, 0.0], [0.0, 0.1]]), torch.tensor([0, 1, 1]))
    bins = reliability(given, None)
    assert bins.images.tolist() == [0] * 7 + [2] + [0] * 6 + [1]
    assert bins.accuracy[-1] == 0
    assert bins.confidence[-1] == 1
    assert bins.accuracy[7] == 1


def test_a_temperature_mends_over_confidence_and_leaves_the_ranking() -> None:
    fitted_on, other = scores(400, 5, scale=6.0), scores(401, 5, scale=6.0)
    temperature = fit_temperature(fitted_on)
    found = measured(other, temperature)
    before, after = found["calibration"]["before"], found["calibration"]["after"]
    assert temperature is not None
    assert temperature > 2
    assert after["ece"] < before["ece"] / 2
    assert after["nll"] < before["nll"]
    assert found["top1"] == figures(other)["top1"]
    assert (probabilities(other.logits, temperature).argmax(1) == other.logits.argmax(1)).all()


def test_the_temperature_minimises_the_cross_entropy() -> None:
    given = scores(500, 4, scale=3.0)
    temperature = fit_temperature(given)
    grid = torch.linspace(math.log(0.5), math.log(10), 400).exp().tolist()
    losses = [functional.cross_entropy(given.logits / t, given.targets, label_smoothing=1 / 502).item() for t in grid]
    assert temperature == pytest.approx(grid[losses.index(min(losses))], rel=0.01)


@pytest.mark.parametrize(
    ("count", "classes", "scale"), [(30, 3, 1.0), (500, 4, 3.0), (400, 5, 6.0), (60, 7, 0.5), (900, 102, 2.0)]
)
def test_the_temperature_is_scipys(count: int, classes: int, scale: float) -> None:
    given = scores(count, classes, scale)

    def loss(log_temperature: float) -> float:
        logits = given.logits.double() / math.exp(log_temperature)
        return functional.cross_entropy(logits, given.targets, label_smoothing=1 / (count + 2)).item()

    found = minimize_scalar(loss, bounds=(math.log(LOWEST), math.log(HIGHEST)), options={"xatol": 1e-10})
    assert fit_temperature(given) == pytest.approx(math.exp(found.x), rel=1e-6)


@pytest.mark.parametrize(("scale", "expected"), [(1e-3, LOWEST), (1e3, HIGHEST), (0.0, 1.0)])
def test_a_temperature_stays_within_its_bounds(scale: float, expected: float) -> None:
    """Where the logits say nothing, every temperature is as good as the next."""
    assert fit_temperature(scores(100, 4, scale)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("gap", [75, 105, 150])
def test_a_temperature_far_from_1_is_found(gap: float) -> None:
    """Where the probabilities are 0 and 1 in float32, the cross-entropy has a slope at 1 and no curvature."""
    targets = torch.arange(60) % 2
    said = torch.where(torch.arange(60) % 10 == 0, 1 - targets, targets)
    found = fit_temperature(Scores(gap * functional.one_hot(said, 2).float(), targets))
    assert found == pytest.approx(gap / 2.13, rel=0.05)


@pytest.mark.parametrize(("count", "fitted"), [(1, False), (29, False), (30, True)])
def test_too_few_images_give_no_temperature(count: int, fitted: bool) -> None:
    assert (fit_temperature(scores(count, 3)) is not None) == fitted


def test_a_split_without_a_mistake_does_not_ask_for_certainty() -> None:
    targets = torch.arange(40) % 2
    temperature = fit_temperature(Scores(4.0 * functional.one_hot(targets, 2), targets))
    confidence = probabilities(4.0 * functional.one_hot(targets, 2), temperature).max(dim=1).values.mean()
    assert 0.95 < confidence < 0.999


def test_figures_that_are_withheld_say_why() -> None:
    found = measured(scores(50, 3), 2.0, "fitted here")
    assert found["calibration"]["after"] is None
    assert found["calibration"]["temperature"] == 2.0
    assert found["undefined"] == {"calibration.after": "fitted here"}


def test_the_most_confused_pairs_come_first() -> None:
    predicted = torch.tensor([1, 1, 1, 0, 2, 2, 0])
    given = Scores(5.0 * functional.one_hot(predicted, 3), torch.tensor([0, 0, 1, 1, 2, 0, 0]))
    assert measured(given)["most_confused"] == [
        {"label": "class 0", "predicted": "class 1", "count": 2},
        {"label": "class 0", "predicted": "class 2", "count": 1},
        {"label": "class 1", "predicted": "class 0", "count": 1},
    ]


def test_many_classes_need_no_square_of_them() -> None:
    """A dense matrix would take 3.2 GB."""
    number, images = 20_000, 60
    predicted = torch.arange(images)
    targets = torch.where(predicted % 2 == 0, predicted, number - 1)
    logits = torch.zeros(images, number).scatter(1, predicted[:, None], 9.0)
    found = measured(Scores(logits, targets))
    assert "confusion_matrix" not in found
    assert found["top1"] == 0.5
    assert found["most_confused"] == [
        {"label": "class 19999", "predicted": f"class {index}", "count": 1} for index in range(1, 2 * PAIRS, 2)
    ]
    assert [row["class"] for row in found["per_class"] if row["support"]] == [
        *(f"class {index}" for index in range(0, images, 2)), "class 19999",
    ]  # fmt: skip


def test_figures_do_not_depend_on_how_many_images_are_computed_with_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = scores(250, 7)
    expected, temperature, rows = measured(given, 2.0), fit_temperature(given), best_classes(given, 2.0, 3)
    monkeypatch.setattr(metrics, "AT_ONCE", 7 * 8 + 3)
    assert AT_ONCE > 250 * 7
    found = measured(given, 2.0)
    assert found["loss"] == pytest.approx(expected["loss"])
    assert (found["top1"], found["top5"], found["n"]) == (expected["top1"], expected["top5"], 250)
    for when in ("before", "after"):
        assert found["calibration"][when] == pytest.approx(expected["calibration"][when])
    assert fit_temperature(given) == pytest.approx(temperature)
    for part, whole in zip(best_classes(given, 2.0, 3), rows, strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    given = scores(10, 3)
    given.logits[4, 1] = value
    with pytest.raises(RunError, match="not finite"):
        measured(given)


@pytest.mark.parametrize(("count", "classes"), [(10, 2), (57, 3), (500, 102)])
def test_class_weights_are_scikit_learns_balanced(count: int, classes: int) -> None:
    targets = scores(count, classes).targets.tolist()
    expected = compute_class_weight("balanced", classes=np.arange(classes), y=np.array(targets))
    found = class_weights(targets, classes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert found[targets].mean().item() == pytest.approx(1)


def test_class_weights_are_finite_where_a_class_has_no_image() -> None:
    assert class_weights([0, 0, 2], 3).isfinite().all()
