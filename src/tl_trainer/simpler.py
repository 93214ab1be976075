"""What simpler methods than a trained head give on the same features: class means, nearest neighbours, ridge.

Each is fitted to features (N, D) and the labels (N, C), one-hot or several, and gives scores (M, C) of others (M, D)
for each of its strengths or numbers of neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.logistic import Axes

NEIGHBOURS = (1, 3, 5, 10, 20, 50)


def class_means(unit: Tensor, labels: Tensor, others: Tensor) -> dict[float, Tensor]:
    """The cosine to the mean of each class, of features of length 1."""
    return {0: others @ functional.normalize(labels.T @ unit).T}


def neighbours(unit: Tensor, labels: Tensor, others: Tensor) -> dict[float, Tensor]:
    """Votes of the nearest rows by cosine, weighted by it, of features of length 1."""
    votes, largest = {}, min(max(NEIGHBOURS), len(unit))
    near = [(part @ unit.T).topk(largest, dim=1) for part in torch.split(others, 1024)]
    weights, rows = torch.cat([part.values + 1 for part in near]), torch.cat([part.indices for part in near])
    targets, several = labels.argmax(dim=1), bool((labels.sum(dim=1) != 1).any())
    for count in NEIGHBOURS:
        if several:  # each votes for all its labels
            voted = [labels[rows[:, k]] * weights[:, k, None] for k in range(min(count, largest))]
            votes[float(count)] = sum(voted[1:], voted[0])
            continue
        none = weights.new_zeros(len(others), labels.shape[1])
        votes[float(count)] = none.scatter_add_(1, targets[rows[:, :count]], weights[:, :count])
    return votes


def ridge(axes: Axes, labels: Tensor, others: Tensor, strengths: Sequence[float]) -> dict[float, Tensor]:
    """Least squares on the labels; the axes of the features serve all strengths (those of the mean square)."""
    mean = labels.mean(dim=0)
    moments, slopes = axes.rotated.square().mean(dim=0), axes.rotated.T @ (labels - mean) / len(labels)
    rotated = (others - axes.mean) @ axes.axes
    return {strength: rotated @ (slopes / (moments + strength)[:, None]) + mean for strength in strengths}
