"""Features as the solver takes them: with the targets of their rows, scaled, and divided into folds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer import label_metrics
from tl_trainer.candidates import UNIT, Layers
from tl_trainer.stratification import stratified

FOLDS = 5


class Table(NamedTuple):
    """Features (N, D) float32, targets (N,), their weights of the classes (N, C), and the image of each row (N,).

    The first views of all images come first. Where images may have several labels, targets are (N, C) and their weights
    (N, C, 2), as `logistic.path` takes them.
    """

    features: Tensor
    targets: Tensor
    soft: Tensor
    images: Tensor

    @property
    def labels(self) -> Tensor:
        """The target of each image."""
        return self.targets[: int(self.images.max()) + 1]

    @property
    def one_hot(self) -> Tensor:
        """(N, C): the targets; of several labels 1 for each that is there."""
        if self.targets.ndim == 2:
            return (self.targets == 1).to(self.features)
        return functional.one_hot(self.targets, self.soft.shape[1]).to(self.features)

    def part(self, rows: Tensor) -> Table:
        """The rows of these indices, or where a mask is true."""
        return Table(*(column[rows] for column in self))


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) float64: the log loss of each image, of several labels the mean over those that are known."""
    if targets.ndim == 2:
        return label_metrics.image_losses(logits, targets)
    return functional.cross_entropy(logits.double(), targets, reduction="none")


def figure_of(scores: Tensor, targets: Tensor) -> float:
    """Top-1; of several labels the mean average precision. scores: (N, C), such as logits."""
    if targets.ndim == 2:
        return label_metrics.mean_average_precision(scores, targets)
    return (scores.argmax(dim=1) == targets).double().mean().item()


class Scaling(NamedTuple):
    """(features - shift) * scale, of rows first brought to length 1 where `unit`."""

    shift: Tensor
    scale: Tensor
    unit: bool = False

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return ((functional.normalize(features) if self.unit else features) - self.shift) * self.scale

    def folded(self, layers: Layers) -> Layers:
        """The layers of a head on scaled features -> on the features themselves, of length 1 where `unit`."""
        (weight, bias), *others = layers
        weight = weight * self.scale
        return [(weight.contiguous(), bias - weight @ self.shift), *others]


def _standardised(features: Tensor) -> Scaling:
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    return Scaling(mean, 1 / torch.where(deviation > 0, deviation, 1))


def _raw(features: Tensor) -> Scaling:
    return Scaling(torch.zeros_like(features[0]), torch.ones_like(features[0]))


def _unit(features: Tensor) -> Scaling:
    return _raw(features)._replace(unit=True)


# Each made for the features of the training images.
SCALINGS: dict[str, Callable[[Tensor], Scaling]] = {"standardised": _standardised, "raw": _raw, UNIT: _unit}


def scalings_for(normalise: Literal["auto", "none", "l2"]) -> list[str]:
    """The names of the scalings that `model.head.normalise` allows."""
    return [name for name in SCALINGS if normalise in ("auto", "l2" if name == UNIT else "none")]


def folds_of(targets: Tensor, groups: Tensor) -> Tensor:
    """(N,): the fold of each image, drawn within each class; an image and its copies share one."""
    if targets.ndim == 2:
        return torch.tensor(stratified(targets.numpy(), [1 / FOLDS] * FOLDS, 0, groups.tolist()))
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    order = order[targets[order].sort(stable=True).indices]
    fold, every = torch.empty_like(targets), torch.arange(len(targets))
    fold[order] = every % FOLDS
    first = torch.full_like(every, len(every)).scatter_reduce(0, groups, every, "amin")  # of each group
    return fold[first[groups]]


def folds_in(table: Table) -> Tensor:
    """(N,) the fold of each row: every class spread evenly, all views of an image together, the same in every run."""
    labels = table.labels.cpu()
    return folds_of(labels, torch.arange(len(labels))).to(table.images.device)[table.images]


def shares_of(fold: Tensor, like: Tensor) -> Tensor:
    """(B, N): how each row counts in the problem of each fold, which is solved without it, and in that of all rows.

    fold: (N,) of each row; FOLDS for all where there are none.
    """
    folds = range(FOLDS) if (fold < FOLDS).any() else ()
    return torch.stack([fold != number for number in (*folds, -1)]).to(like)
