"""Figures over a split as sums and counts, so that a smaller last batch weighs what it should."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class Figures:
    """Mean cross-entropy in nats, and the fractions of n images whose label is the first or among the first five."""

    loss: float
    top1: float
    top5: float
    n: int


class Accuracy:
    """Loss, top-1 and top-5 accuracy over many batches. With fewer than five classes, top-5 is 1."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all batches."""
        self._loss = self._top1 = self._top5 = 0.0
        self._n = 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch: logits (N, classes), targets (N,)."""
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = ranked == targets.unsqueeze(1)
        self._loss += functional.cross_entropy(logits.float(), targets, reduction="sum").item()
        self._top1 += hits[:, 0].sum().item()
        self._top5 += hits.any(dim=1).sum().item()
        self._n += len(targets)

    def compute(self) -> Figures:
        """The figures so far; AssertionError before the first batch."""
        assert self._n, "no batch was added"
        return Figures(self._loss / self._n, self._top1 / self._n, self._top5 / self._n, self._n)


def class_weights(targets: list[int], classes: int) -> Tensor:
    """(classes,) weights n / (classes * count), whose mean over the images is 1 (scikit-learn's `balanced`)."""
    counts = torch.bincount(torch.tensor(targets), minlength=classes)
    return len(targets) / (classes * counts.clamp(min=1).float())
