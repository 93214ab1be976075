"""Figures of a classifier that says of each label whether an image has it, from its logits and the labels.

Targets are (N, L): 1, 0, or UNKNOWN, which counts for no figure. Where nothing else is said a label is predicted from a
probability of 0.5 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.checkpoint import Calibration
from tl_trainer.data.label_texts import UNKNOWN
from tl_trainer.metrics import (
    FEWEST,
    PAIRS,
    Figures,
    Reliability,
    Scores,
    binned,
    check_finite,
    counted,
    macro,
    newton_scale,
)

HALF = 0.5


def above(shares: Tensor, thresholds: Sequence[float]) -> Tensor:
    """(N, L): which probabilities reach their threshold; none reaches 1, that of a label that is never said."""
    limits = torch.tensor(thresholds, dtype=torch.float64)
    return (shares >= limits) & (limits < 1)


def known(targets: Tensor) -> Tensor:
    """(N, L): whether somebody says."""
    return targets != UNKNOWN


def probabilities(logits: Tensor, temperature: float | None) -> Tensor:
    """(N, L) float64, each label's own."""
    return (logits.double() / (temperature or 1.0)).sigmoid()


def entry_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(N, L) float64: the binary cross-entropy of each label, 0 where it is unknown."""
    logits = logits.double()
    return (functional.softplus(logits) - logits * (targets == 1)) * known(targets)


def image_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(N,) float64: the mean over the labels that are known."""
    return entry_losses(logits, targets).sum(dim=1) / known(targets).sum(dim=1).clamp(min=1)


def average_precision(logits: Tensor, had: Tensor) -> float | None:
    """That of one label, (N,) and (N,) bool, as in scikit-learn: precision at each hit; None without an image of it."""
    if not had.any():
        return None
    order = logits.sort(descending=True, stable=True).indices
    ranked, hits = logits[order], had[order].double().cumsum(dim=0)
    last = torch.cat([ranked[1:] != ranked[:-1], ranked.new_ones(1, dtype=torch.bool)])  # of equal ones
    precision, recall = (hits / torch.arange(1, len(hits) + 1).to(hits))[last], (hits / hits[-1])[last]
    return (precision * torch.diff(recall, prepend=recall.new_zeros(1))).sum().item()


def average_precisions(logits: Tensor, targets: Tensor) -> list[float | None]:
    """Of each label, over the images where it is known."""
    there = known(targets)
    columns = range(targets.shape[1])
    return [average_precision(logits[there[:, at], at], targets[there[:, at], at] == 1) for at in columns]


def mean_average_precision(logits: Tensor, targets: Tensor) -> float:
    """Over the labels that an image has; 0 where no image has any."""
    found = [value for value in average_precisions(logits, targets) if value is not None]
    return sum(found) / len(found) if found else 0.0


def counts(said: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L,) each: how often a label is predicted and there, predicted, there; said: (N, L) bool."""
    there, said = targets == 1, said & known(targets)
    return (said & there).sum(dim=0), said.sum(dim=0), there.sum(dim=0)


def subset_accuracy(said: Tensor, targets: Tensor) -> float:
    """The share of the images of which all labels that are known are right; of those with one."""
    some = known(targets).any(dim=1)
    right = (((said == (targets == 1)) | ~known(targets)).all(dim=1) & some).sum().item()
    return right / max(1, int(some.sum()))


def figures(scores: Scores) -> Figures:
    """Loss, mean average precision, F1 and subset accuracy, from a probability of 0.5 on."""
    assert len(scores.targets), "no image to measure"
    losses, targets, said = entry_losses(*scores), scores.targets, scores.logits >= 0
    rows = _rows(said, targets)
    return {
        "loss": losses.sum().item() / max(1, int(known(targets).sum())),
        "map": mean_average_precision(*scores),
        "macro_f1": macro(rows, "f1"),
        "micro_f1": _micro(said, targets)["f1"],
        "subset_accuracy": subset_accuracy(said, targets),
        "n": len(targets),
    }


def fit_temperature(scores: Scores) -> float | None:
    """One for all labels, as `metrics.fit_temperature`: it minimises the binary cross-entropy."""
    if len(scores.targets) < FEWEST:
        return None
    logits, smoothing = scores.logits.double(), 1 / (len(scores.targets) + 2)
    there = known(scores.targets).double()
    wanted = (scores.targets == 1).double() * (1 - 2 * smoothing) + smoothing

    def slope(scale: float) -> tuple[float, float]:
        shares = (logits * scale).sigmoid()
        first = ((shares - wanted) * logits * there).sum().item()
        return first, (shares * (1 - shares) * logits.square() * there).sum().item()

    return 1 / newton_scale(slope)


def fit_thresholds(scores: Scores, temperature: float | None, rule: str | float) -> list[float]:
    """The probability from which on each label is predicted, by a rule as `train.thresholds`.

    It is half way between two images'. A label that no image has, or of which nobody says, gets 0.5; one that never
    has the precision that is asked for gets 1.
    """
    shares, targets = probabilities(scores.logits, temperature), scores.targets
    if isinstance(rule, float):
        return [rule] * targets.shape[1]
    return [_threshold(shares[there, at], targets[there, at] == 1, rule) for at, there in enumerate(known(targets).T)]


def _threshold(shares: Tensor, had: Tensor, rule: str) -> float:
    if not had.any():
        return HALF
    ranked, order = shares.sort(descending=True, stable=True)
    hits, said = had[order].cumsum(dim=0), torch.arange(1, len(order) + 1)
    last = torch.cat([ranked[1:] != ranked[:-1], torch.ones(1, dtype=torch.bool)])
    if rule == "f1":
        at = int(torch.where(last, 2 * hits / (said + hits[-1]), -1).argmax())
    else:
        enough = (last & (hits / said >= float(rule.removeprefix("precision>=")))).nonzero()[:, 0].tolist()
        if not enough:
            return 1.0
        at = enough[-1]
    below = ranked[at + 1] if at + 1 < len(ranked) else 0.0
    return float(ranked[at] + below) / 2


def reliability(scores: Scores, temperature: float | None) -> Reliability:
    """How often a label is there among labels of like probability, over all images."""
    there = known(scores.targets)
    shares, had = probabilities(scores.logits, temperature)[there], (scores.targets[there] == 1).double()
    return binned(shares, had)


def measure(
    scores: Scores, classes: Sequence[str], calibration: Calibration | None, withheld: str | None
) -> dict[str, Any]:
    """All figures as plain data. What is undefined is None, and `undefined` says why.

    `withheld` is the reason why the figures with the temperature are not given, None where they are. The thresholds
    are those of the calibration, for probabilities with its temperature. Raises RunError where a logit is not finite.
    """
    check_finite(scores.logits)
    temperature, thresholds = calibration or (None, [HALF] * len(classes))
    targets, shares = scores.targets, probabilities(scores.logits, temperature)
    said = above(shares, thresholds)
    rows = _rows(said, targets)
    precisions, of_label = average_precisions(scores.logits, targets), _each(scores)
    trusted = None if withheld is not None else temperature
    per_class = [
        {
            "class": name,
            "threshold": round(threshold, 6),
            **row,
            "ap": None if ap is None else round(ap, 7),
            "ece": round(calibration_of(one, trusted)["ece"], 7) if known(one.targets).any() else None,
        }
        for name, threshold, row, ap, one in zip(classes, thresholds, rows, precisions, of_label, strict=True)
    ]
    undefined = {
        f"per_class {row['class']} recall, ap": "no image has this label" for row in per_class if not row["support"]
    }
    if withheld is not None:
        undefined["calibration.after"] = withheld
    return {
        **figures(scores),
        "macro": {key: macro(rows, key) for key in ("precision", "recall", "f1")},
        "micro": _micro(said, targets),
        "exact": subset_accuracy(said, targets),
        "labels_per_image": {
            "there": (targets == 1).sum().item() / len(targets),
            "predicted": said.sum().item() / len(targets),
        },
        "calibration": {
            "temperature": temperature,
            "before": calibration_of(scores, None),
            "after": calibration_of(scores, temperature) if withheld is None else None,
        },
        "most_confused": _most_confused(said, targets, classes),
        "per_class": per_class,
        "undefined": undefined,
    }


def calibration_of(scores: Scores, temperature: float | None) -> dict[str, float]:
    """Negative log-likelihood in nats, Brier score (0 to 1) and expected calibration error of a label that is known."""
    there = known(scores.targets)
    shares, had = probabilities(scores.logits, temperature)[there], (scores.targets[there] == 1).double()
    scaled, number = scores.logits.double() / (temperature or 1.0), max(1, int(there.sum()))
    return {
        "nll": entry_losses(scaled, scores.targets).sum().item() / number,
        "brier": (shares - had).square().sum().item() / number,
        "ece": binned(shares, had).error,
    }


def co_occurrence(targets: Tensor) -> Tensor:
    """(L, L): how many images have both labels; on the diagonal how many have one."""
    there = (targets == 1).double()
    return (there.T @ there).long()


def _each(scores: Scores) -> list[Scores]:
    return [Scores(scores.logits[:, [at]], scores.targets[:, [at]]) for at in range(scores.targets.shape[1])]


def _rows(said: Tensor, targets: Tensor) -> list[dict[str, Any]]:
    """`metrics.counted` of each label."""
    return [counted(*of) for of in zip(*(column.tolist() for column in counts(said, targets)), strict=True)]


def _micro(said: Tensor, targets: Tensor) -> dict[str, float]:
    """Of all labels together; 0 for what is undefined."""
    right, times, support = (int(column.sum()) for column in counts(said, targets))
    return {
        "precision": right / max(1, times),
        "recall": right / max(1, support),
        "f1": 2 * right / max(1, times + support),
    }


def _most_confused(said: Tensor, targets: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Which label was predicted in vain where which was missed, the most frequent pairs first."""
    missed, in_vain = ((targets == 1) & ~said).double(), ((targets == 0) & said).double()
    pairs = (missed.T @ in_vain).long()
    order = pairs.flatten().sort(descending=True, stable=True).indices[:PAIRS].tolist()
    found = [(*divmod(at, len(classes)), int(pairs.flatten()[at])) for at in order]
    return [{"label": classes[label], "predicted": classes[said_], "count": n} for label, said_, n in found if n]
