"""Figures of a classifier over a split, from its logits and the labels."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.errors import RunError

BINS = 15  # of confidence, for the calibration error; what the literature uses since Guo et al. (2017)
PAIRS = 20
FEWEST = 30  # images from which a temperature can be fitted
Z95 = 1.959963984540054  # the normal distribution's 97.5th percentile
AT_ONCE = 1 << 18  # logits that are computed with at a time, so that what comes of them stays in the cache
LOWEST, HIGHEST = 0.01, 100.0  # temperature
CURVES = 200  # classes up to which each has its own F1 and precision-recall curves


Figures = dict[str, float]  # mean cross-entropy in nats as `loss`, the number of images as `n`, and what a task adds


# The figures by which an epoch can be better than another, and whether it is the higher that is better.
HIGHER = {
    "loss": False, "top1": True, "balanced_accuracy": True, "macro_f1": True, "map": True, "micro_f1": True,
    "mean": True,
}  # fmt: skip


@dataclass(frozen=True)
class Prediction:
    """A class and its probability."""

    label: str
    index: int
    probability: float


class Activation(NamedTuple):
    """How the logits of a head become probabilities; several: each by itself, else their sum is 1."""

    classes: int
    temperature: float
    several: bool


class Scores(NamedTuple):
    """What a pass over a split leaves: logits (N, classes) float32 and targets (N, ...), on the CPU."""

    logits: Tensor
    targets: Tensor

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits and targets, some images at a time."""
        images = max(1, AT_ONCE // self.logits.shape[1])
        return zip(torch.split(self.logits, images), torch.split(self.targets, images), strict=True)


@dataclass(frozen=True)
class Confusion:
    """The cells of a confusion matrix that are not zero, (cells,) each, ordered by label, then by predicted class."""

    labels: Tensor
    predicted: Tensor
    counts: Tensor
    classes: int

    def among(self, shown: Tensor) -> Tensor:
        """The counts among the classes `shown`: a row for each as label, a column for each as predicted class."""
        place = torch.full((self.classes,), -1).scatter(0, shown, torch.arange(len(shown)))
        rows, columns = place[self.labels], place[self.predicted]
        inside = (rows >= 0) & (columns >= 0)
        matrix = torch.zeros(len(shown), len(shown), dtype=torch.int64)
        matrix[rows[inside], columns[inside]] = self.counts[inside]
        return matrix

    def worst(self, number: int) -> Tensor:
        """The `number` classes that most mistakes are about, as label or as predicted class, in index order."""
        wrong = self.counts * (self.labels != self.predicted)
        mistakes = torch.zeros(self.classes, dtype=torch.int64)
        mistakes.index_add_(0, self.labels, wrong).index_add_(0, self.predicted, wrong)
        return mistakes.sort(descending=True, stable=True).indices[:number].sort().values


def is_better(figures: Figures, best: Figures, by: str, least: float) -> bool:
    """Whether `figures` beat `best` by more than `least` in the figure `by`; where that much is 0, the lower loss
    decides between equal ones.
    """
    gain = (figures[by] - best[by]) * (1 if HIGHER[by] else -1)
    return gain > least or (gain == least == 0 and figures["loss"] < best["loss"])


class Reliability(NamedTuple):
    """Per bin of confidence, (BINS,) each: mean confidence, fraction right, how many images."""

    confidence: Tensor
    accuracy: Tensor
    images: Tensor

    @property
    def error(self) -> float:
        """The expected calibration error: the mean distance of confidence and accuracy."""
        gaps = (self.confidence - self.accuracy).abs() * self.images
        return (gaps.sum() / self.images.sum().clamp(min=1)).item()


def figures(scores: Scores) -> Figures:
    """Loss, top-1 and top-5. With five classes or fewer, top-5 is 1. Raises AssertionError where there is no image."""
    assert len(scores.targets), "no image to measure"
    index, losses, ranks = torch.arange(scores.logits.shape[1]), [], []
    for logits, targets in scores.parts():
        of_label = logits.gather(1, targets[:, None])
        better = (logits > of_label) | ((logits == of_label) & (index < targets[:, None]))
        ranks.append(better.sum(dim=1))
        losses.append(functional.cross_entropy(logits.double(), targets, reduction="none"))
    loss, rank = torch.cat(losses).mean().item(), torch.cat(ranks)
    top1, top5 = ((rank < k).double().mean().item() for k in (1, 5))
    return {"loss": loss, "top1": top1, "top5": top5, "n": len(scores.targets)}


def ranked(logits: Tensor, count: int) -> Tensor:
    """The indices of the `count` best classes, best first, (N, min(count, classes)); the lower index where two tie."""
    return logits.sort(dim=1, descending=True, stable=True).indices[:, :count]


def probabilities(logits: Tensor, temperature: float | None) -> Tensor:
    """(N, classes) float64; a temperature of None is 1, the probabilities as the head gives them."""
    return (logits.double() / (temperature or 1.0)).softmax(dim=1)


def averaged(views: Sequence[Tensor]) -> Tensor:
    """The logits of several views of the same images, each (N, classes), as those of their mean probability."""
    if len(views) == 1:
        return views[0]
    # On the CPU, since an Apple GPU has no float64.
    return torch.stack([view.cpu().double().log_softmax(dim=1) for view in views]).logsumexp(dim=0).float()


def best_classes(scores: Scores, temperature: float | None, count: int) -> tuple[Tensor, Tensor]:
    """The `ranked` classes of each image, and their probabilities, float64."""
    best, shares = [], []
    for logits, _ in scores.parts():
        best.append(ranked(logits, count))
        shares.append(probabilities(logits, temperature).gather(1, best[-1]))
    return torch.cat(best), torch.cat(shares)


def surest_mistakes(scores: Scores, temperature: float | None, count: int) -> list[int]:
    """The images that are put into a wrong class with the highest probabilities, highest first."""
    order = _confidence(scores, temperature).sort(descending=True, stable=True).indices
    mistaken = scores.logits.argmax(dim=1) != scores.targets
    wrong: list[int] = order[mistaken[order]].tolist()
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
    return 1 / newton_scale(lambda scale: _slope(scores, scale))


def newton_scale(slope_at: Callable[[float], tuple[float, float]]) -> float:
    """1 / temperature, in which the cross-entropy is convex, where its slope is 0; slope_at: its two derivatives."""
    low, high, scale = 1 / HIGHEST, 1 / LOWEST, 1.0
    for _ in range(100):
        slope, curvature = slope_at(scale)
        if not slope:
            break
        step = scale - slope / curvature if curvature else math.inf
        low, high = (scale, high) if slope < 0 else (low, scale)
        before, scale = scale, step if low <= step <= high else math.sqrt(low * high)  # Newton's, or half of the rest
        if abs(scale - before) < 1e-5 * scale:  # whose square is what Newton's step is wrong by
            break
    return scale


def _slope(scores: Scores, scale: float) -> tuple[float, float]:
    """The first and second derivative of the smoothed cross-entropy of the logits times `scale`, by `scale`."""
    smoothing, slope, curvature = 1 / (len(scores.targets) + 2), 0.0, 0.0
    for logits, targets in scores.parts():
        below = logits - logits.gather(1, targets[:, None])  # the label's is 0
        weighted = (below * scale).softmax(dim=1).mul_(below)
        mean = weighted.sum(dim=1)
        slope += (mean - smoothing * below.mean(dim=1)).double().sum().item()
        curvature += (weighted.mul_(below).sum(dim=1) - mean.square()).double().sum().item()
    return slope, curvature


def reliability(scores: Scores, temperature: float | None) -> Reliability:
    """How often the first class is right among images of like confidence."""
    right = (scores.logits.argmax(dim=1) == scores.targets).double()
    return binned(_confidence(scores, temperature), right)


def binned(confidence: Tensor, right: Tensor) -> Reliability:
    """(N,) float64 each: probabilities, and 1 for what they are of and is so."""
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    count = torch.bincount(bins, minlength=BINS)
    mean = [torch.bincount(bins, weights=values, minlength=BINS) / count.clamp(min=1) for values in (confidence, right)]
    return Reliability(mean[0], mean[1], count)


def measure(scores: Scores, classes: Sequence[str], temperature: float | None, withheld: str | None) -> dict[str, Any]:
    """All figures as plain data. What is undefined is None, and `undefined` says why.

    `withheld` is the reason why the figures with the temperature are not given, None where they are. Raises RunError
    where a logit is not finite.
    """
    check_finite(scores.logits)
    found = figures(scores)
    rows = per_class(scores, classes)
    present = [row for row in rows if row["support"]]
    undefined = {
        f"per_class {row['class']} recall": "the split has no image of this class" for row in rows if not row["support"]
    }
    if withheld is not None:
        undefined["calibration.after"] = withheld
    return {
        **found,
        "top1_interval": wilson(found["top1"], len(scores.targets)),
        "top5_interval": wilson(found["top5"], len(scores.targets)),
        "balanced_accuracy": balanced_accuracy(rows),
        "macro": {key: macro(rows, key) for key in ("precision", "recall", "f1")},
        "weighted": {
            key: sum(row[key] * row["support"] for row in present) / found["n"] for key in ("precision", "recall", "f1")
        },
        "calibration": {
            "temperature": temperature,
            "before": _calibration(scores, None),
            "after": _calibration(scores, temperature) if withheld is None else None,
        },
        "most_confused": _most_confused(confusion(scores, len(classes)), classes),
        "per_class": rows,
        "undefined": undefined,
    }


def balanced_accuracy(rows: Sequence[dict[str, Any]]) -> float:
    """The mean recall over the classes that the split has, as in scikit-learn; rows: as of `per_class`."""
    recalls: list[float] = [row["recall"] for row in rows if row["support"]]
    return sum(recalls) / len(recalls)


def macro(rows: Sequence[dict[str, Any]], key: str) -> float:
    """The mean over the classes that the split has or that were predicted, 0 for what is undefined, as in scikit-learn;
    rows: as of `per_class`.
    """
    values: list[float] = [row[key] or 0.0 for row in rows if row["support"] or row["predicted"]]
    return sum(values) / len(values) if values else 0.0


AVERAGES: dict[str, Callable[[Sequence[dict[str, Any]]], float]] = {
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": lambda rows: macro(rows, "f1"),
}


def check_finite(logits: Tensor) -> None:
    """Raise RunError where a logit is not finite, before it becomes a figure or a probability."""
    if not logits.isfinite().all():
        raise RunError("the network's output is not finite; its weights were damaged, or its training went wrong")


def confusion(scores: Scores, classes: int) -> Confusion:
    """The cells of the confusion matrix that are not zero."""
    cells, counts = torch.unique(scores.targets * classes + scores.logits.argmax(dim=1), return_counts=True)
    return Confusion(cells // classes, cells % classes, counts, classes)


def per_class(scores: Scores, classes: Sequence[str]) -> list[dict[str, Any]]:
    """`counted` of each class, with its name."""
    targets, predicted = scores.targets, scores.logits.argmax(dim=1)
    counts = (torch.bincount(of, minlength=len(classes)) for of in (targets, predicted, targets[targets == predicted]))
    return [
        {"class": name, **counted(right, times, support)}
        for name, support, times, right in zip(classes, *(column.tolist() for column in counts), strict=True)
    ]


def counted(right: int, times: int, support: int) -> dict[str, Any]:
    """Precision, recall, F1 and numbers of images of a class, from how often it is predicted and right, predicted,
    and there.

    None is what is undefined: recall where no image has the class, the others where it was not predicted either.
    """
    return {
        "precision": _share(right, times or support),
        "recall": _share(right, support),
        "f1": _share(2 * right, times + support),
        "support": support,
        "predicted": times,
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 7) if whole else None


def _most_confused(matrix: Confusion, classes: Sequence[str]) -> list[dict[str, Any]]:
    wrong = matrix.labels != matrix.predicted
    cells = torch.stack([matrix.labels, matrix.predicted, matrix.counts])[:, wrong]
    order = cells[2].sort(descending=True, stable=True).indices[:PAIRS]
    return [
        {"label": classes[label], "predicted": classes[predicted], "count": count}
        for label, predicted, count in cells[:, order].T.tolist()
    ]


def _confidence(scores: Scores, temperature: float | None) -> Tensor:
    """The probability of each image's first class, (N,) float64."""
    scaled = (logits.double() / (temperature or 1.0) for logits, _ in scores.parts())
    return torch.cat([(part.amax(dim=1) - part.logsumexp(dim=1)).exp() for part in scaled])


def _calibration(scores: Scores, temperature: float | None) -> dict[str, float]:
    """Negative log-likelihood in nats, Brier score (over all classes, 0 to 2) and expected calibration error."""
    nll = brier = 0.0
    for logits, targets in scores.parts():
        logs = (logits.double() / (temperature or 1.0)).log_softmax(dim=1)
        of_label = logs.gather(1, targets[:, None])
        nll -= of_label.sum().item()
        brier += (logs.exp().square().sum() - 2 * of_label.exp().sum() + len(targets)).item()
    images = len(scores.targets)
    return {"nll": nll / images, "brier": brier / images, "ece": reliability(scores, temperature).error}
