"""Heads for a table of features, each solved to convergence, and compared by the log loss on images that judge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer import mlp, simpler
from tl_trainer.candidates import LINEAR, MEANS, NEIGHBOURS, RIDGE, UNIT, Found, Layers, Row
from tl_trainer.errors import RunError
from tl_trainer.ground.progress import bar
from tl_trainer.logistic import STRENGTHS, Axes, Solution, path, promising
from tl_trainer.tables import FOLDS, SCALINGS, Table, figure_of, folds_in, losses_of, shares_of

FEWEST_VAL, FEWEST_DRAWN = 200, 2_000  # validation images from which they decide: of the source's own split, of a drawn
PAIRS = 10**9  # of images of train and val, up to which neighbours are looked for


class Compared(NamedTuple):
    """The linear heads that were solved, the rows of simpler methods, and what judged them, as `Found` has it."""

    solved: list[_Solved]
    simpler: list[Row]
    judged: str
    images: int
    folds: int
    several: bool

    def found(self, unit: bool | None = None) -> Found:
        """The best; unit: of those for features of length 1, or of the others. Raises RunError where none converged."""
        best = _best([one for one in self.solved if unit is None or unit == (one.row.scaling == UNIT)])
        rows, told = [*(one.row for one in self.solved), *self.simpler], (self.judged, self.images, self.folds)
        return Found(rows, best.row, best.layers, *told, several=self.several, alike=unit is not None)


def compare(
    train: Table,
    val: Table,
    *,
    scalings: Sequence[str] = tuple(SCALINGS),
    drawn: bool = False,
    pause: Callable[[], None] = lambda: None,
    folds: Tensor | None = None,
) -> Compared:
    """Linear heads for the features, and beside them what simpler methods give. `drawn`: val was from train.

    folds: the fold of each image of train for cross-validation, FOLDS where there is none; None: drawn here.
    """
    few = len(val.targets) < (FEWEST_DRAWN if drawn else FEWEST_VAL)
    few = few and (folds is None or bool((folds < FOLDS).any()))
    fold = torch.full_like(train.images, FOLDS)
    if few:
        fold = folds_in(train) if folds is None else folds.to(fold.device)[train.images]
    judged = _judged(train, fold) if few else train.images[:0]
    standard, solved = None, []
    for name in scalings:
        axes, candidates = _linear(name, train, val, fold, judged, pause)
        standard = axes if name == "standardised" else standard  # which serve ridge regression too
        solved += candidates
    parts = [(train, val)]
    if few:
        inside = torch.zeros_like(fold, dtype=torch.bool).index_fill_(0, judged, True)
        parts += [(train.part(fold != number), train.part(inside & (fold == number))) for number in range(FOLDS)]
    simple = [*_simpler(parts, standard, pause)]
    words = f"{len(val.targets):,} validation images"
    divided = int(fold.max()) + 1 if few else 0
    words += f" and {divided}-fold cross-validation over train" if few else ""
    return Compared(solved, simple, words, len(val.targets) + len(judged), divided, several=val.targets.ndim == 2)


def _linear(
    name: str, train: Table, val: Table, fold: Tensor, judged: Tensor, pause: Callable[[], None]
) -> tuple[Axes, list[_Solved]]:
    """The linear candidates on features of that scaling, and the axes of these.

    fold: (N,) of each row, none below FOLDS where val alone judges. judged: the rows of train that judge too.
    """
    scaling, targets = SCALINGS[name](train.features), torch.cat([val.targets, train.targets[judged]])
    axes, of_val = Axes.of(scaling(train.features)), scaling(val.features)

    def solved(solution: Solution) -> _Solved:
        weight, bias = solution.head()
        logits = of_val @ weight.T + bias
        if len(judged):
            logits = torch.cat([logits, solution.logits[fold[judged], judged]])
        losses = losses_of(logits, targets)
        loss, note = losses.mean().item(), "" if solution.converged.all() else "did not converge"
        note = note if math.isfinite(loss) else "diverged"
        row = Row(LINEAR, name, solution.strength, loss, figure_of(logits, targets), note)
        pause()
        return _Solved(row, losses, scaling.folded([(weight, bias)]))

    solutions = path(axes, train.soft, shares_of(fold, train.soft), STRENGTHS)
    heads = bar(solutions, f"heads on {name} features", len(STRENGTHS), unit="head")
    return axes, list(promising(map(solved, heads), lambda candidate: candidate.losses.mean()))


def find_mlp(
    train: Table,
    val: Table,
    plan: mlp.Plan,
    dropouts: Sequence[float] = mlp.DROPOUTS,
    *,
    unit: bool = False,
    pause: Callable[[], None] = lambda: None,
) -> Found:
    """The best head with hidden layers, judged by val; beside it what a linear head and simpler methods give.

    Raises RunError where no candidate converges.
    """
    features = functional.normalize(train.features) if unit else train.features
    scaling = SCALINGS["standardised"](features)._replace(unit=unit)
    samples, of_val = mlp.Samples(scaling(train.features), train.soft, len(train.labels)), scaling(val.features)
    settings = [mlp.Setting(*of) for of in itertools.product(mlp.RATES, mlp.DECAYS, dropouts)]
    method, solved = f"MLP {' '.join(map(str, plan.hidden))}", []
    for (rate, decay, dropout), epochs, logits, layers in mlp.train_heads(
        samples, (of_val, val.targets), plan, settings, pause
    ):
        losses = losses_of(logits, val.targets)
        note, top1 = "" if epochs else "diverged", figure_of(logits, val.targets)
        scaled = UNIT if unit else "standardised"
        row = Row(method, scaled, decay, losses.mean().item(), top1, note, rate, dropout, epochs)
        solved.append(_Solved(row, losses, layers))
    best = _best(solved)
    axes, linear = _linear("standardised", train, val, torch.full_like(train.images, FOLDS), train.images[:0], pause)
    rows = [*(candidate.row for candidate in [*solved, *linear]), *_simpler([(train, val)], axes, pause)]
    count, layers, several = len(val.targets), scaling.folded(best.layers), val.targets.ndim == 2
    return Found(rows, best.row, layers, f"{count:,} validation images", count, several=several)


def refitted(found: Found, train: Table, val: Table, pause: Callable[[], None], folds: Tensor | None = None) -> Found:
    """The linear head that was found, solved again on train and val together.

    The val images are judged by cross-validation: of each, the logits are those of a head that did not see it. folds:
    the fold of each image, those of val after those of train; None: drawn here. Raises RunError where it does not
    converge, or where groups leave no folds.
    """
    if folds is not None and (folds == FOLDS).any():
        raise RunError("there are too few groups to judge val by cross-validation; set train.refit=false")
    count, more = len(train.labels), len(val.labels)
    val = val._replace(images=val.images + count)
    both = Table(*(torch.cat([of[:count], also, of[count:]]) for of, also in zip(train, val, strict=True)))
    scaling = SCALINGS[found.best.scaling](both.features)
    fold = folds_in(both) if folds is None else folds.to(both.images.device)[both.images]
    strengths = STRENGTHS[: STRENGTHS.index(found.best.strength) + 1]
    for solution in path(Axes.of(scaling(both.features)), both.soft, shares_of(fold, both.soft), strengths):
        pause()
        last = solution
    if not last.converged.all():
        raise RunError("the head did not converge on train and val together; set train.refit=false")
    rows = torch.arange(count, count + more, device=fold.device)
    return replace(found, layers=scaling.folded([last.head()]), held_out=last.logits[fold[rows], rows])


class _Solved(NamedTuple):
    """A candidate: its row, the loss of each image it was judged by (N,), its layers on features as they are."""

    row: Row
    losses: Tensor
    layers: Layers


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


def _judged(table: Table, fold: Tensor) -> Tensor:
    """The first view of each image whose class has one in another fold; else, its own is solved without the class."""
    labels = table.labels
    if labels.ndim == 2:
        return (fold[: len(labels)] < FOLDS).nonzero()[:, 0]
    inside = labels * (FOLDS + 1) + fold[: len(labels)]
    return (torch.bincount(labels)[labels] > torch.bincount(inside)[inside]).nonzero()[:, 0]


def _simpler(parts: Sequence[tuple[Table, Table]], axes: Axes | None, pause: Callable[[], None]) -> Iterator[Row]:
    """Nearest class mean, nearest neighbours, ridge regression: each fitted to one table and judged by another.

    axes: of the standardised features of the first table, where they are known.
    """
    parts = [(fitted, judged) for fitted, judged in parts if len(judged.targets)]
    targets = torch.cat([judged.targets for _, judged in parts])

    ready = [axes] if axes else []

    def ridge(features: Tensor, labels: Tensor, others: Tensor) -> dict[float, Tensor]:
        return simpler.ridge(ready.pop() if ready else Axes.of(features), labels, others, STRENGTHS)

    methods = [(MEANS, UNIT, simpler.class_means), (RIDGE, "standardised", ridge)]
    if sum(len(fitted.targets) * len(judged.targets) for fitted, judged in parts) <= PAIRS:
        methods.insert(1, (NEIGHBOURS, UNIT, simpler.neighbours))
    for method, name, scores_of in methods:
        found = []
        for fitted, judged in parts:
            scaling = SCALINGS[name](fitted.features)
            found.append(scores_of(scaling(fitted.features), fitted.one_hot, scaling(judged.features)))
        for strength in found[0]:
            yield Row(method, name, strength, None, figure_of(torch.cat([part[strength] for part in found]), targets))
        pause()
