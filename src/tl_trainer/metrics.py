"""Figures of a classifier over a split, from its logits and the labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.errors import RunError

BINS = 15  # of confidence, for the calibration error; what the literature uses since Guo et al. (2017)
PAIRS = 20
FEWEST = 30  # images from which a temperature can be fitted
Z95 = 1.959963984540054  # the normal distribution's 97.5th percentile


Figures = dict[str, float]  # mean cross-entropy in nats as `loss`, the number of images as `n`, and what a task adds


class Scores(NamedTuple):
    """What a pass over a split leaves: logits (N, classes) float32 and targets (N, ...), on the CPU."""

    logits: Tensor
    targets: Tensor


class Reliability(NamedTuple):
    """Per bin of confidence, (BINS,) each: mean confidence, fraction right, how many images."""

    confidence: Tensor
    accuracy: Tensor
    images: Tensor


def figures(scores: Scores) -> Figures:
    """Loss, top-1 and top-5. With five classes or fewer, top-5 is 1. Raises AssertionError where there is no image."""
    logits, targets = scores
    assert len(targets), "no image to measure"
    of_label, index = logits.gather(1, targets[:, None]), torch.arange(logits.shape[1])
    better = (logits > of_label) | ((logits == of_label) & (index < targets[:, None]))
    rank = better.sum(dim=1)
    loss = functional.cross_entropy(logits.double(), targets).item()
    top1, top5 = ((rank < k).double().mean().item() for k in (1, 5))
    return {"loss": loss, "top1": top1, "top5": top5, "n": len(targets)}


def ranked(logits: Tensor, count: int) -> Tensor:
    """The indices of the `count` best classes, best first, (N, min(count, classes)); the lower index where two tie."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :count]


def probabilities(logits: Tensor, temperature: float | None) -> Tensor:
    """(N, classes) float64; a temperature of None is 1, the probabilities as the head gives them."""
    return (logits.double() / (temperature or 1.0)).softmax(dim=1)


def surest_mistakes(scores: Scores, temperature: float | None, count: int) -> list[int]:
    """The images that are put into a wrong class with the highest probabilities, highest first."""
    confidence, predicted = probabilities(scores.logits, temperature).max(dim=1)
    order = confidence.sort(descending=True, stable=True).indices
    wrong: list[int] = order[predicted[order] != scores.targets[order]].tolist()
    return wrong[:count]


def class_weights(targets: list[int], classes: int) -> Tensor:
    """(classes,) weights n / (classes * count), whose mean over the images is 1 (scikit-learn's `balanced`)."""
    counts = torch.bincount(torch.tensor(targets), minlength=classes)
    return len(targets) / (classes * counts.clamp(min=1).float())


def wilson(fraction: float, n: int) -> list[float]:
    """The 95% confidence interval of a fraction of n independent images (Wilson, 1927)."""
    square = Z95**2
    middle = fraction + square / (2 * n)
    spread = Z95 * math.sqrt(fraction * (1 - fraction) / n + square / (4 * n * n))
    return [max(0.0, (middle - spread) / (1 + square / n)), min(1.0, (middle + spread) / (1 + square / n))]


def fit_temperature(scores: Scores) -> float | None:
    """What to divide the logits by so that the probabilities mean what they say (Guo et al., ICML 2017).

    It minimises the cross-entropy. The targets are smoothed by 1 / (n + 2), as Platt (1999) did, or a split without a
    mistake would ask for a certainty that n images cannot support. None where there are fewer than FEWEST images: what
    so few say would make the probabilities worse as often as better.
    """
    if len(scores.targets) < FEWEST:
        return None
    from scipy.optimize import minimize_scalar

    logits, smoothing = scores.logits.double(), 1 / (len(scores.targets) + 2)

    def loss(log_temperature: float) -> float:
        scaled = logits / math.exp(log_temperature)
        return functional.cross_entropy(scaled, scores.targets, label_smoothing=smoothing).item()

    found = minimize_scalar(loss, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def reliability(scores: Scores, temperature: float | None) -> Reliability:
    """How often the first class is right among images of like confidence."""
    confidence = probabilities(scores.logits, temperature).max(dim=1).values
    right = (scores.logits.argmax(dim=1) == scores.targets).double()
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count = torch.bincount(bins, minlength=BINS)
    mean = [torch.bincount(bins, weights=values, minlength=BINS) / count.clamp(min=1) for values in (confidence, right)]
    return Reliability(mean[0], mean[1], count)


def measure(scores: Scores, classes: Sequence[str], temperature: float | None, withheld: str | None) -> dict[str, Any]:
    """All figures as plain data. What is undefined is None, and `undefined` says why.

    As in scikit-learn, balanced accuracy is over the classes that the split has, macro over those that it has or that
    were predicted, with 0 for what is undefined. `withheld` is the reason why the figures with the temperature are not
    given, None where they are. Raises RunError where a logit is not finite.
    """
    check_finite(scores.logits)
    found = figures(scores)
    matrix = confusion(scores, len(classes))
    rows = per_class(scores, classes)
    present = [row for row in rows if row["support"]]
    counted = [row for row in rows if row["support"] or row["predicted"]]
    undefined = {
        f"per_class {row['class']} recall": "the split has no image of this class" for row in rows if not row["support"]
    }
    if withheld is not None:
        undefined["calibration.after"] = withheld
    return {
        **found,
        "top1_interval": wilson(found["top1"], len(scores.targets)),
        "top5_interval": wilson(found["top5"], len(scores.targets)),
        "balanced_accuracy": sum(row["recall"] for row in present) / len(present),
        "macro": {key: sum(row[key] or 0 for row in counted) / len(counted) for key in ("precision", "recall", "f1")},
        "weighted": {
            key: sum(row[key] * row["support"] for row in present) / found["n"] for key in ("precision", "recall", "f1")
        },
        "calibration": {
            "temperature": temperature,
            "before": _calibration(scores, None),
            "after": _calibration(scores, temperature) if withheld is None else None,
        },
        "most_confused": _most_confused(matrix, classes),
        "per_class": rows,
        "confusion_matrix": matrix.tolist(),
        "undefined": undefined,
    }


def check_finite(logits: Tensor) -> None:
    """Raise RunError where a logit is not finite, before it becomes a figure or a probability."""
    if not logits.isfinite().all():
        raise RunError("the network's output is not finite; its weights were damaged, or its training went wrong")


def confusion(scores: Scores, classes: int) -> Tensor:
    """(classes, classes) counts: rows are labels, columns predictions."""
    from torchmetrics.functional import classification  # takes a second to import

    return classification.multiclass_confusion_matrix(scores.logits.argmax(dim=1), scores.targets, classes)


def per_class(scores: Scores, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and numbers of images of each class; None for what is undefined: recall where the split
    has no image of the class, the others where it was not predicted either.
    """
    from torchmetrics.functional import classification

    predicted, number = scores.logits.argmax(dim=1), len(classes)
    counts = [torch.bincount(values, minlength=number).tolist() for values in (scores.targets, predicted)]
    shares = {
        name: [round(value, 7) for value in function(predicted, scores.targets, number, average=None).tolist()]
        for name, function in (
            ("precision", classification.multiclass_precision),
            ("recall", classification.multiclass_recall),
            ("f1", classification.multiclass_f1_score),
        )
    }
    rows = []
    for index, (name, support, times) in enumerate(zip(classes, *counts, strict=True)):
        defined = {"precision": support or times, "recall": support, "f1": support or times}
        values = {key: value[index] if defined[key] else None for key, value in shares.items()}
        rows.append({"class": name, **values, "support": support, "predicted": times})
    return rows


def _most_confused(matrix: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    wrong = matrix.clone().fill_diagonal_(0).flatten()
    order = wrong.sort(descending=True, stable=True).indices[:PAIRS].tolist()
    cells = [(*divmod(cell, len(classes)), int(wrong[cell])) for cell in order]
    return [
        {"label": classes[label], "predicted": classes[predicted], "count": count}
        for label, predicted, count in cells
        if count
    ]


def _calibration(scores: Scores, temperature: float | None) -> dict[str, float]:
    """Negative log-likelihood in nats, Brier score (over all classes, 0 to 2) and expected calibration error."""
    logits = scores.logits.double() / (temperature or 1.0)
    target = functional.one_hot(scores.targets, logits.shape[1])
    bins = reliability(scores, temperature)
    gaps = (bins.confidence - bins.accuracy).abs() * bins.images
    return {
        "nll": functional.cross_entropy(logits, scores.targets).item(),
        "brier": (logits.softmax(dim=1) - target).square().sum(dim=1).mean().item(),
        "ece": (gaps.sum() / len(scores.targets)).item(),
    }
