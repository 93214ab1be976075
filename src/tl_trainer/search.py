"""The head is found, not trained for epochs: on cached features every strength of a linear head costs next to nothing.

Each candidate is solved to convergence, so no learning rate and no seed is in the answer. The choice is by the log loss
on validation images, and where these are few also by that of cross-validation over train.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer.assembly import Setup
from tl_trainer.errors import DataError, RunError
from tl_trainer.features import FeatureBatches, Features, free_on
from tl_trainer.feeds import Feed
from tl_trainer.ground.files import csv_text
from tl_trainer.ground.machine import free_memory, threads_for
from tl_trainer.ground.progress import bar
from tl_trainer.logistic import Axes, path

log = logging.getLogger(__name__)

STRENGTHS = [10 ** (3 - step / 4) for step in range(37)]  # of L2, 1e3 to 1e-6
FOLDS = 5
FEWEST_VAL, FEWEST_DRAWN = 200, 2_000  # validation images from which they decide: of the source's own split, of a drawn
HOPELESS = 1.25  # of the best log loss so far: where a path of ever weaker strengths ends
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
PAIRS = 10**9  # of images of train and val, up to which neighbours are looked for
LINEAR = "logistic regression"


class Table(NamedTuple):
    """Features (N, D) float32, targets (N,), their weights of the classes (N, C), and the image of each row (N,).

    The first views of all images come first.
    """

    features: Tensor
    targets: Tensor
    soft: Tensor
    images: Tensor

    @property
    def labels(self) -> Tensor:
        """The target of each image."""
        return self.targets[: int(self.images.max()) + 1]


@dataclass(frozen=True)
class Row:
    """A candidate: method, how the features are scaled, its strength or number of neighbours, and how good it is.

    loss: the log loss in nats; None for a method that gives no probabilities. note: why it may not be chosen, if so.
    """

    method: str
    scaling: str
    strength: float
    loss: float | None
    top1: float
    note: str = ""


@dataclass(frozen=True)
class Found:
    """All candidates, the linear one that was chosen, its weight (C, D) and bias (C,), and how it was judged."""

    rows: list[Row]
    best: Row
    weight: Tensor
    bias: Tensor
    judged: str

    @property
    def unit(self) -> bool:
        """Whether the head takes features of length 1."""
        return self.best.scaling == UNIT

    def summary(self) -> dict[str, Any]:
        """What result.json says of the search."""
        return {**asdict(self.best), "candidates": len(self.rows), "judged_by": self.judged}

    def curves(self) -> dict[str, list[tuple[float, float, float]]]:
        """(strength, log loss, top-1) of the linear candidates, by how their features are scaled."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for row in self.rows:
            if row.loss is not None and not row.note:
                found.setdefault(row.scaling, []).append((row.strength, row.loss, row.top1))
        return found

    def shown(self, count: int = 8) -> list[Row]:
        """The choice, the linear candidates of the lowest log loss, and the best of each other method."""
        linear = [row for row in self.rows if row.loss is not None and not row.note]
        linear.sort(key=lambda row: row.loss or 0.0)
        others: dict[str, Row] = {}
        for row in self.rows:
            if row.loss is None and (row.method not in others or row.top1 > others[row.method].top1):
                others[row.method] = row
        next_best = [row for row in linear if row is not self.best][: count - 1 - len(others)]
        return [self.best, *next_best, *others.values()]

    def table(self) -> str:
        """All candidates as CSV."""
        return csv_text((field.name for field in fields(Row)), map(astuple, self.rows))


class Scaling(NamedTuple):
    """(features - shift) * scale, of rows first brought to length 1 where `unit`."""

    shift: Tensor
    scale: Tensor
    unit: bool = False

    def __call__(self, features: Tensor) -> Tensor:
        """(N, D) -> (N, D)"""
        return ((functional.normalize(features) if self.unit else features) - self.shift) * self.scale


UNIT = "length 1"


def _standardised(features: Tensor) -> Scaling:
    deviation, mean = torch.std_mean(features, dim=0, correction=0)
    return Scaling(mean, 1 / torch.where(deviation > 0, deviation, 1))


def _raw(features: Tensor) -> Scaling:
    return Scaling(torch.zeros_like(features[0]), torch.ones_like(features[0]))


SCALINGS: dict[str, Callable[[Tensor], Scaling]] = {
    "standardised": _standardised,
    "raw": _raw,
    UNIT: lambda features: _raw(features)._replace(unit=True),
}


def search(setup: Setup, feeds: dict[str, Feed], pause: Callable[[], None]) -> Found | None:
    """The best head for the features; None, saying why, where it has to be trained for epochs.

    pause: called after every candidate; it may end the search by an exception. Raises RunError for features that are
    not finite.
    """
    parts, (train, val) = setup.parts, (feeds[name].batches for name in ("train", "val"))
    obstacle, head = None, parts.config.model.head
    if parts.network.classifier.trained:
        obstacle = "stages of the backbone train too"
    elif not isinstance(train, FeatureBatches) or not isinstance(val, FeatureBatches):
        obstacle = (
            "its features are not kept (features.cache is off, or there are no features.views of a random transform)"
        )
    elif head.hidden or head.dropout:
        obstacle = "it has hidden layers or dropout"
    elif not (views := _views_that_fit(train.features, len(parts.task.classes), parts.network.device)):
        obstacle = "its features take too much memory"
    else:
        scalings = [name for name in SCALINGS if head.normalise in ("auto", "l2" if name == UNIT else "none")]
        tables = _table(setup, "train", train.features, views), _table(setup, "val", val.features)
        if views < len(train.features.keys):
            log.info("%d of %d views fit into memory and are searched", views, len(train.features.keys))
        with threads_for(tables[0].features.numel() * len(parts.task.classes)):
            found = find(*tables, scalings=scalings, drawn=setup.drawn, pause=pause, folds=_grouped(setup))
        log.info("%d heads, judged by %s:\n%s", len(found.rows), found.judged, "\n".join(best_lines(found)))
        return found
    log.info("the head is trained for %d epochs instead of being searched for: %s", parts.config.train.epochs, obstacle)
    return None


def _grouped(setup: Setup) -> Tensor | None:
    """The folds of the training images where these have groups, at most FOLDS; says where there can be none."""
    split, parts = setup.dataset.split("train"), setup.parts
    if not split.groups:
        return None
    for count in range(FOLDS, 1, -1):
        with contextlib.suppress(DataError):
            return torch.tensor(parts.task.folds(split.targets, count, parts.config.seed, split.groups))
    log.info("the training images have too few groups for cross-validation, so the val images alone choose the head")
    return torch.full((len(split),), FOLDS)


def _views_that_fit(features: Features, classes: int, device: torch.device) -> int:
    """How many views fit into half of the free memory, with the copies and the logits that the search makes of them."""
    free = free_on(device) if device.type == "cuda" else free_memory()
    rows, width = len(features.targets), features.take(0, [0]).numel()
    heads = 4 * len(SCALINGS) * len(STRENGTHS) * width * classes
    view = 4 * rows * (4 * width + 10 * (FOLDS + 1) * classes)
    return min(len(features.keys), max(0, int((free / 2 - heads) // view)))


def _table(setup: Setup, name: str, features: Features, views: int = 1) -> Table:
    parts, count = setup.parts, len(features.targets)
    rows = torch.cat([features.take(view, range(count)).flatten(1).float() for view in range(views)])
    if not rows.norm().isfinite():
        raise RunError(f"the features of the {name} images are not finite or too large; set train.precision=fp32")
    soft = parts.task.soft_targets(parts.config.train.loss, setup.dataset.split(name).targets)
    table = Table(rows, features.targets.repeat(views), soft.repeat(views, 1), torch.arange(count).repeat(views))
    return Table(*(column.to(_device(parts.network.device)) for column in table))


def _device(device: torch.device) -> torch.device:
    """Where to solve: an Apple GPU has neither eigenvectors nor float64."""
    return torch.device("cpu") if device.type == "mps" else device


def find(
    train: Table,
    val: Table,
    *,
    scalings: Sequence[str] = tuple(SCALINGS),
    drawn: bool = False,
    pause: Callable[[], None] = lambda: None,
    folds: Tensor | None = None,
) -> Found:
    """The best linear head for the features, and beside it what simpler methods give. `drawn`: val was from train.

    folds: the fold of each image of train for cross-validation, FOLDS where there is none; None: drawn here. Raises
    RunError where no candidate converges.
    """
    few = len(val.targets) < (FEWEST_DRAWN if drawn else FEWEST_VAL)
    few = few and (folds is None or bool((folds < FOLDS).any()))
    fold = torch.full_like(train.targets, FOLDS)
    if few:
        fold = _folds(train) if folds is None else folds.to(fold.device)[train.images]
    held_out = torch.stack([fold == number for number in (*(range(FOLDS) if few else ()), -1)])
    judged = _judged(train) if few else train.images[:0]
    targets = torch.cat([val.targets, train.targets[judged]])
    solved: list[_Solved] = []
    for name in scalings:
        scaling, lowest = SCALINGS[name](train.features), float("inf")
        of_val = scaling(val.features)
        solutions = path(Axes.of(scaling(train.features)), train.soft, (~held_out).to(train.soft), STRENGTHS)
        for solution in bar(solutions, f"heads on {name} features", len(STRENGTHS), unit="head"):
            weight, bias = solution.head()
            logits = of_val @ weight.T + bias
            if few:
                logits = torch.cat([logits, solution.logits[fold[judged], judged]])
            losses = functional.cross_entropy(logits.double(), targets, reduction="none")
            loss, note = losses.mean().item(), "" if solution.converged.all() else "did not converge"
            note = note if math.isfinite(loss) else "diverged"
            row = Row(LINEAR, name, solution.strength, loss, _top1(logits, targets), note)
            weight = weight * scaling.scale
            solved.append(_Solved(row, losses, weight, bias - weight @ scaling.shift))
            pause()
            lowest = min(lowest, loss)
            if loss > HOPELESS * lowest:
                break
    best = _best(solved)
    parts = [(train, val)]
    if few:
        inside = torch.zeros_like(fold, dtype=torch.bool).index_fill_(0, judged, True)
        parts += [(_part(train, fold != number), _part(train, inside & (fold == number))) for number in range(FOLDS)]
    rows = [*(candidate.row for candidate in solved), *_simpler(parts, pause)]
    words = f"{len(val.targets):,} validation images"
    words += f" and {int(fold.max()) + 1}-fold cross-validation over train" if few else ""
    return Found(rows, best.row, best.weight, best.bias, words)


class _Solved(NamedTuple):
    """A linear candidate: its row, the loss of each image it was judged by (N,), its weight (C, D) and bias (C,)."""

    row: Row
    losses: Tensor
    weight: Tensor
    bias: Tensor


def _best(solved: Sequence[_Solved]) -> _Solved:
    """Of those whose log loss cannot be told from the lowest, the one that is right most often.

    They are within one standard error of the difference (Breiman et al., 1984).
    """
    solved = [candidate for candidate in solved if not candidate.row.note]
    if not solved:
        raise RunError("none of the heads that were compared converged; set train.search=off to train one for epochs")
    lowest = min(solved, key=lambda candidate: candidate.losses.mean().item())
    worse = [(candidate, candidate.losses - lowest.losses) for candidate in solved]
    tied = [candidate for candidate, by in worse if by.mean() <= by.std(correction=0) / len(by) ** 0.5]
    return min(tied, key=lambda candidate: (-candidate.row.top1, candidate.losses.mean().item()))


def _top1(scores: Tensor, targets: Tensor) -> float:
    return (scores.argmax(dim=1) == targets).double().mean().item()


def _judged(table: Table) -> Tensor:
    """The first view of each image whose class has another; without it, a fold is solved without the class."""
    return (torch.bincount(table.labels)[table.labels] > 1).nonzero()[:, 0]


def _folds(table: Table) -> Tensor:
    """(N,) the fold of each row: every class spread evenly, all views of an image together, the same in every run."""
    target = table.labels
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0)).to(target.device)
    order = order[target[order].sort(stable=True).indices]
    fold = torch.empty_like(target)
    fold[order] = torch.arange(len(order), device=target.device) % FOLDS
    return fold[table.images]


def _simpler(parts: Sequence[tuple[Table, Table]], pause: Callable[[], None]) -> Iterator[Row]:
    """Nearest class mean, nearest neighbours, ridge regression: each fitted to one table and judged by another."""
    parts = [(fitted, judged) for fitted, judged in parts if len(judged.targets)]
    targets = torch.cat([judged.targets for _, judged in parts])
    methods = [("nearest class mean", UNIT, _class_means), ("ridge regression", "standardised", _ridge)]
    if sum(len(fitted.targets) * len(judged.targets) for fitted, judged in parts) <= PAIRS:
        methods.insert(1, ("nearest neighbours", UNIT, _neighbours))
    for method, scaling, scores_of in methods:
        found = [scores_of(fitted, judged.features) for fitted, judged in parts]
        for strength in found[0]:
            yield Row(method, scaling, strength, None, _top1(torch.cat([part[strength] for part in found]), targets))
        pause()


def _part(table: Table, rows: Tensor) -> Table:
    return Table(*(column[rows] for column in table))


def _class_means(train: Table, features: Tensor) -> dict[float, Tensor]:
    unit = functional.normalize(train.features)
    return {0: functional.normalize(features) @ functional.normalize(_labels(train).T @ unit).T}


def _neighbours(train: Table, features: Tensor) -> dict[float, Tensor]:
    """Votes of the nearest rows by cosine, weighted by it."""
    unit, votes = functional.normalize(train.features), {}
    largest = min(max(NEIGHBOURS), len(unit))
    near = [(functional.normalize(part) @ unit.T).topk(largest, dim=1) for part in torch.split(features, 1024)]
    weights, rows = torch.cat([part.values + 1 for part in near]), torch.cat([part.indices for part in near])
    for count in NEIGHBOURS:
        none = weights.new_zeros(len(features), train.soft.shape[1])
        votes[float(count)] = none.scatter_add_(1, train.targets[rows[:, :count]], weights[:, :count])
    return votes


def _ridge(train: Table, features: Tensor) -> dict[float, Tensor]:
    """Least squares on the labels; one eigendecomposition serves all strengths (those of the mean square)."""
    scaling = _standardised(train.features)
    axes = Axes.of(scaling(train.features))
    labels = _labels(train)
    mean = labels.mean(dim=0)
    moments, slopes = axes.rotated.square().mean(dim=0), axes.rotated.T @ (labels - mean) / len(labels)
    rotated = (scaling(features) - axes.mean) @ axes.axes
    return {strength: rotated @ (slopes / (moments + strength)[:, None]) + mean for strength in STRENGTHS}


def _labels(table: Table) -> Tensor:
    """(N, C) one-hot."""
    return functional.one_hot(table.targets, table.soft.shape[1]).to(table.features)


def best_lines(found: Found) -> list[str]:
    """The candidates worth seeing, as lines of a table."""
    heading = f"  {'head':20}  {'features':12}  {'strength':>8}  {'log loss':>8}  top-1"
    return [heading] + [
        f"{'>' if row is found.best else ' '} {row.method:20}  {row.scaling:12}  {row.strength:8.2g}  "
        f"{'' if row.loss is None else format(row.loss, '8.4f'):>8}  {row.top1:.1%}"
        for row in found.shown()
    ]
