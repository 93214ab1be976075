"""Figures over a split against scikit-learn's, however the images are divided into batches; class weights."""

from __future__ import annotations

import numpy
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss, top_k_accuracy_score
from sklearn.utils.class_weight import compute_class_weight
from torch import Tensor
from torch.nn import functional

from tl_trainer.metrics import Accuracy, Figures, class_weights


def scores(count: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits (count, classes), half of them right more often than not, and targets (count,)."""
    generator = torch.Generator().manual_seed(100 * count + classes)
    targets = torch.randint(0, classes, (count,), generator=generator)
    targets[:classes] = torch.arange(classes)[:count]  # each class at least once
    logits = torch.randn(count, classes, generator=generator)
    return logits + 1.5 * functional.one_hot(targets, classes), targets


def figures(logits: Tensor, targets: Tensor, batch_size: int) -> Figures:
    accuracy = Accuracy()
    for first in range(0, len(targets), batch_size):
        accuracy.update(logits[first : first + batch_size], targets[first : first + batch_size])
    return accuracy.compute()


@pytest.mark.parametrize("classes", [2, 3, 5, 6, 102])
@pytest.mark.parametrize("batch_size", [7, 48, 1000])
def test_figures_are_scikit_learns(classes: int, batch_size: int) -> None:
    logits, targets = scores(250, classes)
    found = figures(logits, targets, batch_size)
    labels, probabilities = range(classes), logits.double().softmax(dim=1).numpy()
    assert found.n == 250
    assert found.loss == pytest.approx(log_loss(targets, probabilities, labels=labels), rel=1e-6)
    assert found.top1 == accuracy_score(targets, logits.argmax(dim=1))
    assert 0.1 < found.top1 < 0.99
    if classes > 5:
        assert found.top5 == top_k_accuracy_score(targets, probabilities, k=5, labels=labels)
        assert found.top1 < found.top5 < 1
    else:
        assert found.top5 == 1.0


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 31, 61, 62, 63])
def test_the_division_into_batches_does_not_matter(batch_size: int) -> None:
    logits, targets = scores(62, 8)
    whole, divided = figures(logits, targets, 62), figures(logits, targets, batch_size)
    assert (divided.top1, divided.top5, divided.n) == (whole.top1, whole.top5, whole.n)
    assert divided.loss == pytest.approx(whole.loss, rel=1e-6)


def test_a_small_last_batch_weighs_what_it_should() -> None:
    logits, targets = torch.tensor([[9.0, 0.0]] * 9 + [[0.0, 9.0]]), torch.zeros(10, dtype=torch.int64)
    assert figures(logits, targets, 9).top1 == 0.9


@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5])
def test_top5_of_up_to_five_classes_is_1(classes: int) -> None:
    logits, targets = scores(40, classes)
    assert figures(logits, targets, 16).top5 == 1.0


def test_logits_of_lower_precision_are_averaged_in_float32() -> None:
    logits, targets = scores(100, 6)
    half = logits.bfloat16()
    assert figures(half, targets, 10).loss == pytest.approx(functional.cross_entropy(half.float(), targets).item())


def test_reset_forgets_all_batches() -> None:
    logits, targets = scores(50, 6)
    accuracy = Accuracy()
    accuracy.update(*scores(30, 6))
    accuracy.reset()
    accuracy.update(logits, targets)
    assert accuracy.compute() == figures(logits, targets, 50)


def test_no_batch_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no batch"):
        Accuracy().compute()


@pytest.mark.parametrize(("count", "classes"), [(10, 2), (57, 3), (500, 102)])
def test_class_weights_are_scikit_learns_balanced(count: int, classes: int) -> None:
    targets = scores(count, classes)[1].tolist()
    expected = compute_class_weight("balanced", classes=numpy.arange(classes), y=numpy.array(targets))
    found = class_weights(targets, classes)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))
    assert found[targets].mean().item() == pytest.approx(1)


def test_class_weights_are_finite_where_a_class_has_no_image() -> None:
    assert class_weights([0, 0, 2], 3).isfinite().all()
