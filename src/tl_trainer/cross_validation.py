"""Cross-validation on cached features: what the head that a run finds is worth on images it has not seen.

The choice is made within each fold's training images, so that no image is judged by a head that it helped to choose
(Varma & Simon, BMC Bioinformatics 2006).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.assembly import Setup, set_up
from tl_trainer.config.data import expand
from tl_trainer.config.load import Loaded
from tl_trainer.config.schema import Config
from tl_trainer.data.dataset import Dataset, Split
from tl_trainer.errors import InputError, RunError, SettingError
from tl_trainer.features import FeatureBatches, views_that_fit
from tl_trainer.ground.files import csv_text, make_folder, numbered_folder, write_text
from tl_trainer.ground.machine import threads_for
from tl_trainer.ground.progress import bar
from tl_trainer.logistic import STRENGTHS, Axes, Solution, path, promising
from tl_trainer.metrics import Z95, Scores, wilson
from tl_trainer.report import Predictions
from tl_trainer.search import table_of
from tl_trainer.settings import located
from tl_trainer.tables import SCALINGS, Table, scalings_for
from tl_trainer.tasks import Task

log = logging.getLogger(__name__)

FEWEST_FOLDS = 3  # of two, choosing within one's training images would need folds of its own
COARSE = STRENGTHS[::4]  # among which each fold chooses: half a decade beside the best costs next to nothing
JUDGED = "images to judge"  # what messages call them, as the network sees them without a random transform
JUDGES = 500  # images that judge the choice of each fold, where the other folds have as many
# Of the interval, than that of as many independent images, which holds the truth in 91% of the 200 sets of
# scripts/bench_folds.py, and this one, chosen on the same, in 94.5%
# (why: Bates, Hastie & Tibshirani, JASA 2023).
WIDER = 1.15
APPROACH = (100, 10, 1)  # times the strength that was chosen: a path to it


@dataclass(frozen=True)
class Choice:
    """What the training images of a fold chose: how the features are scaled, the strength, its log loss on them."""

    scaling: str
    strength: float
    loss: float


def cross_validate(loaded: Loaded, folds: int) -> dict[str, Any]:
    """Judge the head that a run would find by cross-validation; what folds.json holds. No classifier is kept.

    All images for training take part: train, and val where it was drawn from train. Writes folds.json, predictions.csv
    and per_class.csv into a new folder in output.dir. Raises a TrainerError, for settings and for classes of too few
    images before any image is read.
    """
    started, config, output = time.perf_counter(), loaded.config, expand(loaded.config.output.dir)
    with located(loaded):
        _check(config, folds)
    make_folder(output, "--output")

    def folds_of(dataset: Dataset, task: Task, drawn: bool) -> list[int]:
        taking_part = _taking_part(dataset, drawn)
        return task.folds(taking_part.targets, folds, config.seed, taking_part.groups, taking_part.hashes)

    setup = set_up(loaded, inspect=folds_of)
    parts, split = setup.parts, _taking_part(setup.dataset, setup.drawn)
    fold = torch.tensor(folds_of(setup.dataset, parts.task, setup.drawn))
    own = [name for name in setup.dataset.splits if name != "train" and not (name == "val" and setup.drawn)]
    if own:
        log.info("the source's own %s images take no part in the cross-validation", " and the ".join(own))
    train, judged = _tables(setup, split, folds)
    scalings = scalings_for(config.model.head.normalise)
    with threads_for(train.features.numel() * len(parts.task.classes)):
        logits, choices = out_of_fold(train, judged, fold.to(judged.device), scalings)
    scores = Scores(logits.cpu(), torch.tensor(split.targets))
    measured = parts.task.measure(scores, None, "cross-validation keeps no image on which to fit a temperature")
    rows = measured["per_class"]
    folder = numbered_folder(output, f"{loaded.name}-folds")
    right = (scores.logits.argmax(dim=1) == scores.targets).double()
    result = {
        "folder": str(folder),
        "predictions": str(folder / "predictions.csv"),
        "images": len(split),
        "no_part": own,
        "folds": [
            {"images": int((fold == number).sum()), "top1": right[fold == number].mean().item(), **asdict(choice)}
            for number, choice in enumerate(choices)
        ],
        **measured,
        "top1_interval": interval(right, split.groups),
        "seconds": round(time.perf_counter() - started, 3),
    }
    write_text(folder / "predictions.csv", Predictions(split, parts.task.classes, scores, None).table())
    write_text(folder / "per_class.csv", csv_text(rows[0], (row.values() for row in rows)))
    write_text(folder / "folds.json", json.dumps(result, indent=1, allow_nan=False) + "\n")
    return result


def interval(right: Tensor, groups: Sequence[str] = ()) -> list[float]:
    """The 95% confidence interval of top-1; right: whether the first class is, of each image (images,).

    Images of a group err together, so they count as as many independent ones as have the variance that the groups show
    (the effective sample size; Kish, Survey Sampling, 1965), and as fewer where few groups tell that variance (Korn &
    Graubard, Survey Methodology, 1998). So, by WIDER, do images whose heads share training images.
    """
    share, count = right.double().mean().item(), float(len(right))
    if groups:
        from scipy.special import stdtrit  # nobody else waits for it

        number = {group: index for index, group in enumerate(dict.fromkeys(groups))}
        of_group = torch.tensor([number[group] for group in groups])
        sums = torch.zeros(len(number), dtype=torch.float64).index_add_(0, of_group, right.double() - share)
        variance = sums.square().sum().item() / count**2 * len(number) / (len(number) - 1)
        count = min(count, share * (1 - share) / variance) if variance else len(number)
        count *= float(Z95 / stdtrit(len(number) - 1, 0.975)) ** 2  # Student's t in place of the normal distribution
    return wilson(share, max(1, int(count / WIDER**2)))


def _check(config: Config, folds: int) -> None:
    """Raise SettingError where the head is not one that a search finds."""
    if folds < FEWEST_FOLDS:
        raise InputError(f"--folds {folds}: {FEWEST_FOLDS} or more are needed; 10 is usual")
    what = "--folds judges the head that is found on kept features of a frozen backbone"
    if config.data.task != "single":
        raise SettingError(
            "data.task", "--folds judges classifiers of one class per image; a val or test split does others"
        )
    if config.model.trainable != "head":
        raise SettingError("model.trainable", f"{what}; set it to head")
    if config.model.head.hidden or config.model.head.dropout:
        raise SettingError("model.head", f"{what}, which is a single Linear; leave out hidden and dropout")
    if config.train.phases:
        raise SettingError("train.phases", f"{what}; set train.phases=[]")
    if config.train.search == "off":
        raise SettingError(
            "train.search", f"{what}; set train.search=auto, also where epochs, optimizer or schedule are set"
        )
    if config.features.cache == "off":
        raise SettingError("features.cache", f"{what}; set it to auto")


def _taking_part(dataset: Dataset, drawn: bool) -> Split:
    train = dataset.split("train")
    return train.joined(dataset.split("val")) if drawn else train


def _tables(setup: Setup, split: Split, folds: int) -> tuple[Table, Tensor]:
    """What heads are solved on, as for a search, and the features by which each image is judged (images, D)."""
    parts, config = setup.parts, setup.parts.config
    feeds = parts.feeds.of_run(
        {"train": split, JUDGED: split},
        setup.train_pipeline,
        parts.pipeline,
        config.features.views,
        config.train.epochs,
    )
    kept, judged = feeds["train"].batches, feeds[JUDGED].batches
    if not isinstance(kept, FeatureBatches) or not isinstance(judged, FeatureBatches):
        raise RunError(
            "--folds needs kept features, and random views are not kept; set transforms.train=eval, or features.views "
            "to 2 or more"
        )
    features = kept.features
    logits = len(_pairs(folds, len(split))) * len(parts.task.classes)
    views = views_that_fit(features, 10 * logits, 0, parts.network.device)
    if views == 0:
        raise RunError("the features of the images take too much memory for --folds; take fewer folds or images")
    train, seen = table_of(parts, features, views), table_of(parts, judged.features).features
    if not (train.features.isfinite().all() and seen.isfinite().all()):
        raise RunError("the features of the images are not finite; set train.precision=fp32")
    return train, seen


def out_of_fold(train: Table, judged: Tensor, fold: Tensor, scalings: Sequence[str]) -> tuple[Tensor, list[Choice]]:
    """The logits (images, C) of each image by the head found without its fold, and what was chosen for each fold.

    judged: the features (images, D) by which images are judged. fold: that of each image (images,). Features are
    scaled by mean and deviation of all images, in which there is no label.
    """
    logits = train.soft.new_zeros(len(judged), train.soft.shape[1])
    choices: list[Choice | None] = [None] * (int(fold.max()) + 1)
    for name in scalings:
        scaling = SCALINGS[name](train.features)
        axes, of_judged = Axes.of(scaling(train.features)), scaling(judged)
        better = []
        for number, (strength, loss) in enumerate(_strengths(train, of_judged, fold, axes, name)):
            best = choices[number]
            if best is None or loss < best.loss:
                choices[number] = Choice(name, strength, loss)
                better.append((strength, number))
        for strength in {strength for strength, _ in better}:
            numbers = [number for other, number in better if other == strength]
            shares = torch.stack([fold[train.images] != number for number in numbers]).to(train.soft)
            *_, solution = path(axes, train.soft, shares, [strength * times for times in APPROACH])
            if not solution.converged.all():
                log.warning("a head of the cross-validation did not converge (%s, strength %.2g)", name, strength)
            for problem, number in enumerate(numbers):
                weight, bias = solution.head(problem)
                logits[fold == number] = of_judged[fold == number] @ weight.T + bias
    found = [choice for choice in choices if choice is not None and choice.loss < math.inf]
    if len(found) < len(choices):
        raise RunError("no head of the cross-validation converged; are the features those of a trained backbone?")
    return logits, found


def _strengths(train: Table, judged: Tensor, fold: Tensor, axes: Axes, scaling: str) -> list[tuple[float, float]]:
    """For each fold the strength, and its log loss on images of other folds by heads that saw neither of the two."""
    folds, labels = int(fold.max()) + 1, train.labels
    pairs = _pairs(folds, len(fold))
    inside = [(fold == first) | (fold == second) for first, second in pairs]
    best = torch.full((folds,), math.inf, dtype=torch.float64)
    chosen = [0.0] * folds
    shares = torch.stack([~held_out[train.images] for held_out in inside]).to(train.soft)

    def judge(solution: Solution) -> tuple[float, Tensor]:
        total, count = torch.zeros(folds, dtype=torch.float64), torch.zeros(folds, dtype=torch.float64)
        for problem, (pair, held_out) in enumerate(zip(pairs, inside, strict=True)):
            weight, bias = solution.head(problem)
            known = torch.isin(labels, labels[~held_out])  # a head says nothing of a class that it was not shown
            for of, other in (pair, pair[::-1]):
                rows = (fold == other) & known
                losses = functional.cross_entropy(
                    (judged[rows] @ weight.T + bias).double(), labels[rows], reduction="sum"
                )
                total[of] += losses.item() if solution.converged[problem] else math.inf
                count[of] += int(rows.sum())
        return solution.strength, total / count

    heads = bar(path(axes, train.soft, shares, COARSE), f"heads on {scaling} features", len(COARSE), unit="head")
    for strength, loss in promising(map(judge, heads), lambda judged: judged[1]):
        for number in (loss < best).nonzero()[:, 0].tolist():
            best[number], chosen[number] = loss[number], strength
    return list(zip(chosen, best.tolist(), strict=True))


def _pairs(folds: int, images: int) -> list[tuple[int, int]]:
    """Pairs of folds, the fewest with which each fold's choice is judged by JUDGES images of others, or by all."""
    steps = min(folds // 2, math.ceil(JUDGES * folds / (2 * images)))
    pairs = {(number, (number + step) % folds) for number in range(folds) for step in range(1, steps + 1)}
    return sorted({(min(pair), max(pair)) for pair in pairs})
