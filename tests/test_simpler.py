"""Simpler methods against scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor
from torch.nn import functional

from tl_trainer import simpler
from tl_trainer.logistic import Axes

CLASSES = 3


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features of length 1, their labels one-hot, other features, and the classes of these."""
    generator = torch.Generator().manual_seed(0)
    targets, others = torch.arange(90) % CLASSES, torch.arange(240) % CLASSES
    middles = torch.randn(CLASSES, 20, generator=generator)
    drawn = [middles[of] + 2 * torch.randn(len(of), 20, generator=generator) for of in (targets, others)]
    features, more = (functional.normalize(part) for part in drawn)
    return features, functional.one_hot(targets, CLASSES).float(), more, others


def test_ridge_is_that_of_scikit_learn(samples: tuple[Tensor, ...]) -> None:
    features, labels, others, _ = samples
    scores = simpler.ridge(Axes.of(features), labels, others, [1.0, 0.01])
    for strength, found in scores.items():
        reference = Ridge(alpha=strength * len(features)).fit(features.numpy(), labels.numpy())
        torch.testing.assert_close(found, torch.from_numpy(reference.predict(others.numpy())), atol=1e-4, rtol=0)


def test_nearest_neighbours_vote_by_their_cosine(samples: tuple[Tensor, ...]) -> None:
    features, labels, others, _ = samples
    scores = simpler.neighbours(features, labels, others)
    assert list(scores) == list(simpler.NEIGHBOURS)

    def weights(distances):  # type: ignore[no-untyped-def]
        return 2 - distances  # the cosine + 1

    for count in (1, 10):
        reference = KNeighborsClassifier(count, metric="cosine", weights=weights).fit(features, labels.argmax(dim=1))
        said = torch.from_numpy(reference.predict(others.numpy()))
        assert (scores[count].argmax(dim=1) == said).all()


def test_class_means_are_the_nearest_by_cosine(samples: tuple[Tensor, ...]) -> None:
    features, labels, others, targets = samples
    [scores] = simpler.class_means(features, labels, others).values()
    means = functional.normalize(
        torch.from_numpy(NearestCentroid().fit(features, labels.argmax(dim=1)).centroids_).float()
    )
    assert ((others @ means.T).argmax(dim=1) == scores.argmax(dim=1)).all()
    assert (scores.argmax(dim=1) == targets).double().mean() > 0.6
