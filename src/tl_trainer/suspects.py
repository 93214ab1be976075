"""Labels that may be wrong, images far from their class, and classes that look alike, all from features alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.ground.machine import threads_for
from tl_trainer.ground.progress import bar
from tl_trainer.logistic import STRENGTHS, Axes, Solution, path, promising
from tl_trainer.metrics import Scores, confusion
from tl_trainer.tables import FOLDS, SCALINGS, folds_of

STRONG_TO_WEAK = STRENGTHS[::2]  # no candidate is chosen for a run here, so half as many do
NEIGHBOURS = 5
FEWEST = 10  # images of a class from which it has a distribution
FAR = 3.5  # median deviations, as `deviations` counts them
_ROWS = 256  # at once


class Confused(NamedTuple):
    """Two classes, how many of their images were taken for the other one, and how many they have."""

    first: int
    second: int
    mistaken: int
    images: int


class Outliers(NamedTuple):
    """Of each image the deviations of its distance to its class, and its nearest image there (-1: there is none)."""

    deviations: np.ndarray
    nearest: np.ndarray


def out_of_fold(features: Tensor, targets: Tensor, groups: Tensor, classes: int) -> Tensor:
    """(N, classes): what a linear head that has not seen the image, nor a copy of it, makes of it.

    features: (N, D) float32. groups: (N,), the same number for an image and its copies. The strength of L2 is the one
    of the lowest log loss.
    """
    fold = folds_of(targets, groups)
    held_out = fold == torch.arange(FOLDS)[:, None]
    scaled = SCALINGS["standardised"](features)(features)
    soft, every = functional.one_hot(targets, classes).to(features), torch.arange(len(targets))
    lowest, best = float("inf"), soft

    def judge(solution: Solution) -> tuple[Tensor, Tensor]:
        logits = solution.logits[fold, every]
        return logits, functional.cross_entropy(logits, targets)

    with threads_for(features.numel() * classes):
        solutions = path(Axes.of(scaled), soft, (~held_out).to(features), STRONG_TO_WEAK)
        heads = bar(solutions, "heads that have not seen the image", len(STRONG_TO_WEAK), unit="head")
        for logits, loss in promising(map(judge, heads), lambda judged: judged[1]):
            if loss < lowest:
                lowest, best = loss.item(), logits
    return best.softmax(dim=1)


def wrong_labels(probabilities: Tensor, targets: Tensor) -> int:
    """How many labels are estimated to be wrong, by confident learning (Northcutt, Jiang & Chuang, 2021).

    An image counts for a class where its probability is at least the mean of that class's own images, and of several
    such for the most probable: those that count for another class than their label are the off-diagonal of the
    confident joint.
    """
    classes = probabilities.shape[1]
    own = probabilities.gather(1, targets[:, None])[:, 0]
    present = torch.bincount(targets, minlength=classes)
    usual = torch.zeros(classes).to(own).scatter_add_(0, targets, own) / present.clamp(min=1)
    counts = (probabilities >= usual) & (present > 0)
    counted = torch.where(counts, probabilities, -1).argmax(dim=1)
    return int((counts.any(dim=1) & (counted != targets)).sum())


def by_self_confidence(probabilities: Tensor, targets: Tensor) -> Tensor:
    """The images, the one whose own label is the least probable first; (N,)."""
    return probabilities.gather(1, targets[:, None])[:, 0].argsort(stable=True)


def nearest(features: Tensor, targets: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """For each of `images` the image of the class in `labels` whose features of length 1 are the most similar."""
    found = torch.empty_like(images)
    for label in torch.bincount(labels).nonzero()[:, 0]:
        members = (targets == label).nonzero()[:, 0]
        for rows in (labels == label).nonzero()[:, 0].split(_ROWS):
            found[rows] = members[(features[images[rows]] @ features[members].T).argmax(dim=1)]
    return found


def outliers(features: Tensor, targets: Tensor, groups: Tensor) -> Outliers:
    """How far features of length 1 (N, D) are from their class: the mean distance to the NEIGHBOURS nearest there."""
    mean, closest, deviation = np.zeros(len(targets)), np.full(len(targets), -1), np.zeros(len(targets))
    for label in torch.bincount(targets).nonzero()[:, 0]:
        members = (targets == label).nonzero()[:, 0]
        for rows in members.split(_ROWS):
            apart = 1 - features[rows] @ features[members].T
            apart[groups[rows][:, None] == groups[members]] = float("inf")  # itself and its copies
            found = apart.topk(min(NEIGHBOURS, len(members)), dim=1, largest=False)
            there = found.values.isfinite()
            mean[rows] = torch.where(there, found.values, 0).sum(dim=1) / there.sum(dim=1).clamp(min=1)
            closest[rows] = torch.where(there[:, 0], members[found.indices[:, 0]], -1)
        inside = members.numpy()[closest[members] >= 0]
        if len(inside) >= FEWEST:  # distances are skewed, their logarithms hardly
            deviation[inside] = deviations(np.log(mean[inside].clip(min=1e-6)))
    return Outliers(deviation, closest)


def deviations(values: np.ndarray) -> np.ndarray:
    """How far values are from their median, in median absolute deviations scaled to standard ones; 0 where all agree.

    The modified z-score of Iglewicz & Hoaglin (How to Detect and Handle Outliers, 1993), who take 3.5 for far.
    """
    apart = values - np.median(values)
    scale = np.median(np.abs(apart))
    return 0.6745 * apart / scale if scale > 0 else np.zeros_like(apart)


def confused(probabilities: Tensor, targets: Tensor) -> list[Confused]:
    """The pairs of classes that were taken for each other, the largest share of their images first."""
    classes = probabilities.shape[1]
    matrix, present = confusion(Scores(probabilities, targets), classes), torch.bincount(targets, minlength=classes)
    pairs = torch.stack([matrix.labels, matrix.predicted]).sort(dim=0).values
    both, place = torch.unique(pairs, dim=1, return_inverse=True)
    counts = torch.zeros(both.shape[1], dtype=torch.int64).scatter_add_(0, place, matrix.counts)
    found = [
        Confused(first, second, count, int(present[first] + present[second]))
        for first, second, count in zip(*both.tolist(), counts.tolist(), strict=True)
        if first != second
    ]
    return sorted(found, key=lambda pair: -pair.mistaken / pair.images)
