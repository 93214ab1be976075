"""Label suspects, outliers and confused classes, against scikit-learn, scipy and figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import median_abs_deviation
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors
from torch import Tensor
from torch.nn import functional

from tl_trainer import suspects
from tl_trainer.suspects import (
    FOLDS,
    NEIGHBOURS,
    Confused,
    by_self_confidence,
    confused,
    deviations,
    nearest,
    out_of_fold,
    outliers,
    wrong_labels,
)
from tl_trainer.tables import folds_of


def noise(count: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def alone(count: int) -> Tensor:
    return torch.arange(count)


def top1(features: Tensor, targets: Tensor, groups: Tensor) -> float:
    return (out_of_fold(features, targets, groups, 2).argmax(dim=1) == targets).double().mean().item()


def test_no_head_judges_what_it_has_seen() -> None:
    targets = torch.arange(60) % 2
    features = noise(60, 200)
    assert top1(features, targets, alone(60)) < 0.7  # on its own images a head would be right each time
    features[:, :50] += 3 * targets[:, None]
    assert top1(features, targets, alone(60)) == 1


def test_no_head_judges_a_copy_of_what_it_has_seen() -> None:
    targets, features = (torch.arange(60) % 2).repeat(2), noise(60, 200).repeat(2, 1)
    assert top1(features, targets, alone(120)) > 0.8
    assert top1(features, targets, alone(60).repeat(2)) < 0.7


def test_each_fold_has_its_share_of_each_class_and_whole_groups() -> None:
    targets = torch.tensor([0] * 20 + [1] * 10)
    fold = folds_of(targets, alone(30))
    assert [(fold[targets == 0] == number).sum().item() for number in range(FOLDS)] == [4] * FOLDS
    assert [(fold[targets == 1] == number).sum().item() for number in range(FOLDS)] == [2] * FOLDS
    groups = alone(30)
    groups[[3, 7, 25]] = 3
    grouped = folds_of(targets, groups)
    assert grouped[[7, 25]].tolist() == [grouped[3].item()] * 2
    others = [index for index in range(30) if index not in (7, 25)]
    assert grouped[others].tolist() == fold[others].tolist()


def test_wrong_labels_by_hand() -> None:
    """Class 0 has a mean of 0.7 and class 1 of 0.6: only the third image counts for a class that is not its label."""
    probabilities = torch.tensor([[0.95, 0.05], [0.8, 0.2], [0.35, 0.65], [0.2, 0.8], [0.45, 0.55], [0.55, 0.45]])
    targets = torch.tensor([0, 0, 0, 1, 1, 1])
    assert wrong_labels(probabilities, targets) == 1
    assert by_self_confidence(probabilities, targets).tolist() == [2, 5, 4, 1, 3, 0]
    three = functional.pad(probabilities, (0, 1))  # nobody has the third label
    assert wrong_labels(three, targets) == 1


def test_flipped_labels_are_the_least_believed() -> None:
    targets = torch.arange(100) % 2
    features = noise(100, 20)
    features[:, 0] += 8 * targets
    flipped = targets.clone()
    flipped[[10, 31, 77]] = 1 - flipped[[10, 31, 77]]
    probabilities = out_of_fold(features, flipped, alone(100), 2)
    assert {*by_self_confidence(probabilities, flipped)[:3].tolist()} == {10, 31, 77}
    assert wrong_labels(probabilities, flipped) == 3


@pytest.mark.parametrize("rows", [4, 1024])
def test_the_distance_to_the_class_is_that_to_its_nearest_images(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "_ROWS", rows)
    features, targets = functional.normalize(noise(40, 6) + 2), torch.arange(40) % 2
    features[4] = -features[4]
    found = outliers(features, targets, alone(40))
    for label in (0, 1):
        inside = features[targets == label].numpy()
        search = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, metric="cosine", algorithm="brute").fit(inside)
        distances, nearest = search.kneighbors(inside)
        expected = deviations(np.log(distances[:, 1:].mean(axis=1)))
        assert found.deviations[targets == label] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert found.nearest[targets == label].tolist() == (2 * nearest[:, 1] + label).tolist()
    assert found.deviations.argmax() == 4
    assert found.deviations[4] > suspects.FAR


def test_a_copy_is_no_neighbour_and_a_small_class_has_no_outlier() -> None:
    features, targets, groups = functional.normalize(noise(24, 6) + 2), torch.tensor([0] * 12 + [1] * 12), alone(24)
    features[3] = features[5] = -features[3]
    assert outliers(features, targets, groups).nearest[3] == 5
    groups[5] = 3
    assert outliers(features, targets, groups).nearest[3] not in (3, 5)
    few = outliers(features[3:6], torch.tensor([0, 0, 1]), alone(3))
    assert (few.deviations.tolist(), few.nearest.tolist()) == ([0, 0, 0], [1, 0, -1])


@pytest.mark.parametrize("rows", [2, 1024])
def test_the_nearest_image_of_a_class(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suspects, "_ROWS", rows)
    features, targets = functional.normalize(noise(30, 5)), torch.arange(30) % 3
    images, labels = torch.tensor([4, 0, 7, 9, 11]), torch.tensor([2, 1, 0, 1, 1])
    found = nearest(features, targets, images, labels)
    for image, label, other in zip(images, labels, found, strict=True):
        products = features @ features[image]
        assert other == max((index for index in range(30) if targets[index] == label), key=lambda i: products[i])


def test_deviations_are_modified_z_scores() -> None:
    values = np.random.default_rng(0).random(50)
    expected = (values - np.median(values)) / median_abs_deviation(values, scale="normal")
    assert deviations(values) == pytest.approx(expected, rel=1e-3)
    assert deviations(np.array([1.0, 1.0, 1.0, 9.0])).tolist() == [0, 0, 0, 0]


def test_confused_classes_are_counted_both_ways() -> None:
    targets, said = torch.arange(60) % 4, (torch.arange(60) ** 2 // 7) % 4
    matrix = confusion_matrix(targets, said)
    both = matrix + matrix.T
    expected = {
        Confused(a, b, int(both[a, b]), int(matrix[a].sum() + matrix[b].sum()))
        for a in range(4)
        for b in range(a + 1, 4)
        if both[a, b]
    }
    found = confused(functional.one_hot(said, 4).float(), targets)
    assert {*found} == expected
    shares = [pair.mistaken / pair.images for pair in found]
    assert shares == sorted(shares, reverse=True)
