"""The head is found, not trained for epochs: on cached features every strength of a linear head costs next to nothing.

Each candidate is solved to convergence, so no learning rate and no seed is in the answer. The choice is by the log loss
on validation images, and where these are few also by that of cross-validation over train.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tl_trainer import mlp, simpler
from tl_trainer.assembly import Parts, Setup
from tl_trainer.candidates import LINEAR, MEANS, NEIGHBOURS, RIDGE, UNIT, Found, FoundHeads, Layers, Row
from tl_trainer.errors import DataError, RunError
from tl_trainer.features import FeatureBatches, Features, views_that_fit
from tl_trainer.feeds import Feed
from tl_trainer.ground.machine import threads_for
from tl_trainer.ground.progress import bar
from tl_trainer.ground.wording import printable
from tl_trainer.logistic import STRENGTHS, Axes, Solution, path, promising
from tl_trainer.multitask import Head, MultiTask
from tl_trainer.tables import FOLDS, SCALINGS, Table, figure_of, folds_in, folds_of, losses_of, scalings_for, shares_of
from tl_trainer.tasks import Task

log = logging.getLogger(__name__)

FEWEST_VAL, FEWEST_DRAWN = 200, 2_000  # validation images from which they decide: of the source's own split, of a drawn
PAIRS = 10**9  # of images of train and val, up to which neighbours are looked for


def search(setup: Setup, feeds: dict[str, Feed], pause: Callable[[], None]) -> Found | FoundHeads | None:
    """The best head for the features; None, saying why, where it has to be trained for epochs.

    pause: called after every candidate, and of an MLP after every batch; it may end the search by an exception. Raises
    RunError for features that are not finite, and where train.refit asks for a search that is not possible.
    """
    section = setup.parts.config.train
    try:
        found = find_head(setup, feeds, pause)
    except NotSearchable as obstacle:
        if section.refit:
            raise RunError(f"train.refit needs a head that is found, and this one is not: {obstacle}") from None
        log.info("the head is trained for %d epochs instead of being searched for: %s", section.epochs, obstacle)
        return None
    for name, part in found.parts.items():
        said = f"{printable(name)}: " if name else ""
        log.info("%s%d heads, judged by %s:\n%s", said, len(part.rows), part.judged, "\n".join(part.lines()))
        if remark := part.remark():
            log.info("%s%s", said, remark)
    return found


class NotSearchable(Exception):
    """Why a head has to be trained for epochs, in words."""


def find_head(setup: Setup, feeds: dict[str, Feed], pause: Callable[[], None]) -> Found | FoundHeads:
    """The best head for the features; pause: as for `search`. Raises NotSearchable, and RunError as `search` does."""
    parts, (train, val) = setup.parts, (feeds[name].batches for name in ("train", "val"))
    head, task = parts.config.model.head, parts.task
    if parts.network.classifier.trained:
        raise NotSearchable("stages of the backbone train too")
    if not isinstance(train, FeatureBatches) or not isinstance(val, FeatureBatches):
        raise NotSearchable(
            "its features are not kept (features.cache is off, or there are no features.views of a random transform)"
        )
    if head.dropout and not head.hidden:
        raise NotSearchable("it has dropout")
    if isinstance(task, MultiTask) and head.hidden:
        raise NotSearchable("several heads share its hidden layers")
    if not (views := views_that_fit(train.features, *_work(parts), parts.network.device)):
        raise NotSearchable("its features take too much memory")
    if views < len(train.features.keys):
        log.info("%d of %d views fit into memory and are searched", views, len(train.features.keys))
    kept = _Kept(train.features, val.features, views)
    with threads_for(views * len(train.features.targets) * parts.features * len(task.classes)):
        return (
            _found_heads(task.heads, setup, kept, pause) if isinstance(task, MultiTask) else _found(setup, kept, pause)
        )


class _Kept(NamedTuple):
    """The features that are kept of train and of val, and how many views of train are searched."""

    train: Features
    val: Features
    views: int

    def tables(self, parts: Parts, head: Head | None = None) -> tuple[Table, Table]:
        """Those of train and val, of a head alone where one is named."""
        tables = table_of(parts, self.train, self.views, head), table_of(parts, self.val, head=head)
        for name, table in zip(("train", "val"), tables, strict=True):
            if not table.features.norm().isfinite():
                what = f"the features of the {name} images are not finite or too large"
                raise RunError(f"{what}; set train.precision=fp32")
        return tables


def _grouped(setup: Setup, *names: str, head: Head | None = None) -> Tensor | None:
    """The folds of the images of these splits where they have groups or copies; says where there can be none."""
    splits, parts = [setup.dataset.split(name) for name in names], setup.parts
    task, rows, targets = _asked(parts, torch.tensor([target for split in splits for target in split.targets]), head)
    hashes = [digest for split in splits for digest in split.hashes]
    hashes = [hashes[row] for row in rows]
    if not splits[0].groups:
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(hashes))}
        same = torch.tensor([numbers[digest] for digest in hashes])
        return folds_of(targets, same) if len(numbers) < len(hashes) else None
    groups = [group for split in splits for group in split.groups]
    groups = [groups[row] for row in rows]
    for count in range(FOLDS, 1, -1):
        with contextlib.suppress(DataError):
            return torch.tensor(task.folds(targets.tolist(), count, parts.config.seed, groups, hashes))
    log.info("the training images have too few groups for cross-validation, so the val images alone choose the head")
    return torch.full((len(targets),), FOLDS)


def _asked(parts: Parts, targets: Tensor, head: Head | None) -> tuple[Task, Sequence[int], Tensor]:
    """The task of a head, or that of all; which images have a label there, and their targets."""
    if head is None:
        return parts.task, range(len(targets)), targets
    known, own = head.own(targets)
    return head.task, known.nonzero()[:, 0].tolist(), own


def _found(setup: Setup, kept: _Kept, pause: Callable[[], None]) -> Found:
    config, (train, val) = setup.parts.config, kept.tables(setup.parts)
    if (head := config.model.head).hidden:
        plan = mlp.Plan(head.hidden, head.dropout, config.train.batch_size, config.seed)
        return find_mlp(train, val, plan, unit=head.normalise == "l2", pause=pause)
    scalings = scalings_for(head.normalise)
    found = find(train, val, scalings=scalings, drawn=setup.drawn, pause=pause, folds=_grouped(setup, "train"))
    return refitted(found, train, val, pause, _grouped(setup, "train", "val")) if config.train.refit else found


def _found_heads(heads: Sequence[Head], setup: Setup, kept: _Kept, pause: Callable[[], None]) -> FoundHeads:
    """The best of each head, among those with features of length 1 or the others: whichever have the lower loss."""
    config, scalings = setup.parts.config, scalings_for(setup.parts.config.model.head.normalise)
    compared = []
    for head in heads:
        if not head.own(kept.val.targets)[0].any():
            raise NotSearchable(f"no val image has a label of {printable(head.name)}")
        train, val = kept.tables(setup.parts, head)
        folds = _grouped(setup, "train", head=head)
        compared.append(compare(train, val, scalings=scalings, drawn=setup.drawn, pause=pause, folds=folds))

    def loss(found: list[Found]) -> float:
        return sum(head.weight * (of.best.loss or 0.0) for head, of in zip(heads, found, strict=True))

    alike = sorted({name == UNIT for name in scalings})
    found = min(([of.found(unit=unit) for of in compared] for unit in alike), key=loss)
    held_out = None
    if config.train.refit:
        held_out = torch.zeros(len(kept.val.targets), len(setup.parts.task.classes))
        for number, head in enumerate(heads):
            folds = _grouped(setup, "train", "val", head=head)
            again = refitted(found[number], *kept.tables(setup.parts, head), pause, folds)
            assert again.held_out is not None
            held_out[head.own(kept.val.targets)[0].cpu(), head.of] = again.held_out.cpu()
            found[number] = again
    return FoundHeads({head.name: of for head, of in zip(heads, found, strict=True)}, held_out)


class _Work(NamedTuple):
    """What a search keeps of each row of features, and in all, in numbers."""

    row: int
    kept: int


def _work(parts: Parts) -> _Work:
    """By how many numbers the memory of a search is counted: the logits of all problems at once, and all heads."""
    widths = [parts.features, *(hidden := parts.config.model.head.hidden), classes := len(parts.task.classes)]
    size = sum(wide * narrow for wide, narrow in itertools.pairwise(widths))
    linear = _Work(10 * (FOLDS + 1) * classes, len(SCALINGS) * len(STRENGTHS) * parts.features * classes)
    if not hidden:
        return linear
    at_once = len(mlp.RATES) * len(mlp.DECAYS)  # with gradients and AdamW's two means
    return _Work(linear.row, linear.kept + (len(mlp.DROPOUTS) + 4) * at_once * size)


def table_of(parts: Parts, features: Features, views: int = 1, head: Head | None = None) -> Table:
    """The features as the solver takes them, where it solves; of a head the images that have a label there."""
    task, at, targets = _asked(parts, features.targets, head)
    rows = torch.cat([features.take(view, at).flatten(1).float() for view in range(views)])
    soft = task.soft_targets(parts.config.train.loss, targets.tolist())
    targets, soft = (torch.cat([column] * views) for column in (targets, soft))
    table = Table(rows, targets, soft, torch.arange(len(at)).repeat(views))
    device = parts.network.device  # but an Apple GPU has neither eigenvectors nor float64
    return Table(*(column.to("cpu" if device.type == "mps" else device) for column in table))


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
        rows = [*(candidate.row for candidate in self.solved), *self.simpler]
        return Found(rows, best.row, best.layers, self.judged, self.images, self.folds, several=self.several)


def find(train: Table, val: Table, **options: Any) -> Found:
    """The best linear head for the features; options: those of `compare`. Raises RunError where none converges."""
    return compare(train, val, **options).found()


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
    train: Table, val: Table, plan: mlp.Plan, *, unit: bool = False, pause: Callable[[], None] = lambda: None
) -> Found:
    """The best head with hidden layers, judged by val; beside it what a linear head and simpler methods give.

    A dropout of 0 in the plan is left to the search. Raises RunError where no candidate converges.
    """
    features = functional.normalize(train.features) if unit else train.features
    scaling = SCALINGS["standardised"](features)._replace(unit=unit)
    samples = mlp.Samples(scaling(train.features), train.soft, len(train.labels))
    of_val, settings = (
        scaling(val.features),
        list(itertools.starmap(mlp.Setting, itertools.product(mlp.RATES, mlp.DECAYS))),
    )
    method, solved = f"MLP {' '.join(map(str, plan.hidden))}", []
    for dropout in bar([plan.dropout] if plan.dropout else mlp.DROPOUTS, method, unit="dropout"):
        heads = mlp.train_heads(samples, (of_val, val.targets), plan._replace(dropout=dropout), settings, pause)
        for (rate, decay), epochs, logits, layers in heads:
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
