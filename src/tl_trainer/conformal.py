"""Sets of classes that hold the right one as often as is asked for: split conformal prediction.

The score of a class is the probability of all classes ahead of it together, and PENALTY for each rank beyond FREE:
RAPS (Angelopoulos et al., ICLR 2021) after APS (Romano et al., NeurIPS 2020), without the random term. So the first
class is always in the set, and an image always has the same set; where the first class alone is right more often than
is asked for, so are the sets. In a set are the classes whose score is no higher than that of the label of the share
`coverage` of the validation images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tl_trainer.errors import InputError
from tl_trainer.metrics import Scores, probabilities

FREE, PENALTY = 5, 0.01
ROUNDING = 1e-9  # of a share times a number of images


def label_scores(scores: Scores, temperature: float | None) -> Tensor | None:
    """The score that each image has for its label, (N,) float64, ascending; None where an image has several labels."""
    if scores.targets.ndim != 1:
        return None
    parts = []
    for logits, targets in scores.parts():
        ranking, of_rank = _ranked(logits, temperature)
        parts.append(of_rank[ranking == targets[:, None]])
    return torch.cat(parts).sort().values


def threshold(of_labels: Tensor | None, coverage: float) -> float:
    """The score up to which classes are in a set. of_labels: what a checkpoint keeps of `label_scores`.

    Raises InputError for a coverage that is no share, or that so few images cannot promise.
    """
    if not 0 < coverage < 1:
        raise InputError(f"--coverage {coverage:g}: give a share between 0 and 1, such as 0.9")
    if of_labels is None:
        raise InputError(
            "--coverage needs what best.pth keeps of its validation images, and this one has nothing: its run has not "
            "ended (go on with tl-train --resume), or an older tl-trainer wrote it (train again)"
        )
    rank = math.ceil((len(of_labels) + 1) * coverage - ROUNDING)
    if rank > len(of_labels):
        needed = math.ceil(coverage / (1 - coverage) - ROUNDING)
        raise InputError(
            f"--coverage {coverage:g} needs {needed:,} validation images or more, and the run had {len(of_labels):,}; "
            "ask for less, or raise data.val_fraction and train again"
        )
    return of_labels[rank - 1].item()


def sets(logits: Tensor, temperature: float | None, most: float) -> list[list[int]]:
    """The classes whose score is at most `most` for each image of (N, classes), the most probable first."""
    ranking, of_rank = _ranked(logits, temperature)
    sizes = (of_rank <= most).sum(dim=1).tolist()
    return [row[:size] for row, size in zip(ranking.tolist(), sizes, strict=True)]


def measure(scores: Scores, temperature: float | None, most: float) -> dict[str, float]:
    """How often the sets hold the label, and how many classes they have."""
    held = sizes = 0
    for logits, targets in scores.parts():
        ranking, of_rank = _ranked(logits, temperature)
        inside = of_rank <= most
        sizes += int(inside.sum())
        held += int((inside & (ranking == targets[:, None])).sum())
    images = len(scores.targets)
    return {"coverage": held / images, "mean_set_size": sizes / images}


def _ranked(logits: Tensor, temperature: float | None) -> tuple[Tensor, Tensor]:
    """The classes of each image, the most probable first, and their scores, which ascend; both (N, classes)."""
    shares, ranking = probabilities(logits, temperature).sort(dim=1, descending=True, stable=True)
    beyond = (torch.arange(shares.shape[1]) + 1 - FREE).clamp(min=0)
    return ranking, shares.cumsum(dim=1) - shares + PENALTY * beyond
