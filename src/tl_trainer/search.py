"""The head is found, not trained for epochs: on cached features every strength of a linear head costs next to nothing.

Each candidate is solved to convergence, so no learning rate and no seed is in the answer. The choice is by the log loss
on validation images, and where these are few also by that of cross-validation over train. Of several heads each is
searched for alone.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tl_trainer import mlp
from tl_trainer.assembly import Parts, Setup
from tl_trainer.candidates import UNIT, Found, FoundHeads
from tl_trainer.comparison import Compared, compare, find_mlp, refitted
from tl_trainer.errors import DataError, RunError
from tl_trainer.features import FeatureBatches, Features, views_that_fit
from tl_trainer.feeds import Feed
from tl_trainer.ground.machine import threads_for
from tl_trainer.ground.wording import printable
from tl_trainer.logistic import STRENGTHS
from tl_trainer.multitask import Head, MultiTask
from tl_trainer.tables import FOLDS, SCALINGS, Table, folds_of, scalings_for
from tl_trainer.tasks import Task

log = logging.getLogger(__name__)


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
    if views < train.features.views:
        log.info("%d of %d views fit into memory and are searched", views, train.features.views)
    kept = _Kept(train.features, val.features, views)
    with threads_for(views * len(train.features.targets) * parts.features * len(task.classes)):
        if isinstance(task, MultiTask):
            return _found_heads(task.heads, setup, kept, pause)
        return _found(setup, kept, pause)


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


def _grouped(parts: Parts, *features: Features, head: Head | None = None) -> Tensor | None:
    """The folds of the images of these features where they have groups or copies; says where there can be none."""
    hashes = [digest for of_split in features for digest in of_split.split.hashes]
    groups = [group for of_split in features for group in of_split.split.groups]
    if not groups and len({*hashes}) == len(hashes):
        return None
    task, rows, targets = _asked(parts, torch.cat([of_split.targets.cpu() for of_split in features]), head)
    hashes = [hashes[row] for row in rows]
    if not groups:
        numbers = {digest: number for number, digest in enumerate(dict.fromkeys(hashes))}
        return folds_of(targets, torch.tensor([numbers[digest] for digest in hashes]))
    groups = [groups[row] for row in rows]
    for count in range(FOLDS, 1, -1):
        with contextlib.suppress(DataError):
            return torch.tensor(task.folds(targets.tolist(), count, parts.config.seed, groups, hashes))
    of = f" of {printable(head.name)}" if head else ""
    log.info(
        "the training images%s have too few groups for cross-validation, so the val images alone choose the head", of
    )
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
        plan = mlp.Plan(head.hidden, config.train.batch_size, config.seed)
        dropouts = [head.dropout] if head.dropout else mlp.DROPOUTS
        return find_mlp(train, val, plan, dropouts, unit=head.normalise == "l2", pause=pause)
    scalings, folds = scalings_for(head.normalise), _grouped(setup.parts, kept.train)
    found = compare(train, val, scalings=scalings, drawn=setup.drawn, pause=pause, folds=folds).found()
    if not config.train.refit:
        return found
    return refitted(found, train, val, pause, _grouped(setup.parts, kept.train, kept.val))


def _found_heads(heads: Sequence[Head], setup: Setup, kept: _Kept, pause: Callable[[], None]) -> FoundHeads:
    """The best of each head, all for features of length 1 or none: whichever have the lower loss, weighted."""
    scalings = scalings_for(setup.parts.config.model.head.normalise)
    for head in heads:
        for name, features, least in (("train", kept.train, 2), ("val", kept.val, 1)):
            if (labelled := int(head.own(features.targets)[0].sum())) < least:
                raise NotSearchable(f"{labelled} {name} images have a label of {printable(head.name)}")
    compared = []
    for head in heads:
        with _naming(head):
            tables, folds = kept.tables(setup.parts, head), _grouped(setup.parts, kept.train, head=head)
            compared.append(compare(*tables, scalings=scalings, drawn=setup.drawn, pause=pause, folds=folds))
    found = alike(heads, compared, sorted({name == UNIT for name in scalings}))
    held_out = None
    if setup.parts.config.train.refit:
        held_out = torch.full((len(kept.val.targets), len(setup.parts.task.classes)), math.nan)
        for number, head in enumerate(heads):
            with _naming(head):
                folds = _grouped(setup.parts, kept.train, kept.val, head=head)
                found[number] = again = refitted(found[number], *kept.tables(setup.parts, head), pause, folds)
            assert again.held_out is not None
            held_out[head.own(kept.val.targets)[0].cpu(), head.of] = again.held_out.cpu()
    return FoundHeads({head.name: of for head, of in zip(heads, found, strict=True)}, held_out)


def alike(heads: Sequence[Head], compared: Sequence[Compared], units: Sequence[bool]) -> list[Found]:
    """The best of each head, with the `unit` that gives them the lower sum of their losses, each by its weight.

    Raises RunError, naming the head, where for no unit all of them converged.
    """
    ways: list[tuple[float, list[Found]]] = []
    for unit in units:
        try:
            found = [_best_of(head, of, unit) for head, of in zip(heads, compared, strict=True)]
        except RunError as error:
            failure = error
            continue
        losses = [of.best.loss for of in found if of.best.loss is not None]
        ways.append((sum(head.weight * loss for head, loss in zip(heads, losses, strict=True)), found))
    if not ways:
        raise failure
    return min(ways, key=lambda way: way[0])[1]


def _best_of(head: Head, compared: Compared, unit: bool) -> Found:
    with _naming(head):
        return compared.found(unit)


@contextlib.contextmanager
def _naming(head: Head) -> Iterator[None]:
    """Errors of the search name the head."""
    try:
        yield
    except RunError as error:
        raise RunError(f"{printable(head.name)}: {error}") from error


class _Work(NamedTuple):
    """What a search keeps of each row of features, and in all, in numbers."""

    row: int
    kept: int


def _work(parts: Parts) -> _Work:
    """By how many numbers the memory of a search is counted: the logits of all problems at once, and all heads.

    Several heads are solved one after the other.
    """
    widths = [parts.features, *(hidden := parts.config.model.head.hidden), classes := len(parts.task.classes)]
    size = sum(wide * narrow for wide, narrow in itertools.pairwise(widths))
    widest = max(len(head.task.classes) for head in parts.task.heads) if isinstance(parts.task, MultiTask) else classes
    linear = _Work(10 * (FOLDS + 1) * widest, len(SCALINGS) * len(STRENGTHS) * parts.features * classes)
    if not hidden:
        return linear
    heads = len(mlp.RATES) * len(mlp.DECAYS) * len(mlp.DROPOUTS)
    return _Work(linear.row, linear.kept + 5 * heads * size)  # at their best; now, with gradients and AdamW's two means


def table_of(parts: Parts, features: Features, views: int = 1, head: Head | None = None) -> Table:
    """The features as the solver takes them, where it solves; of a head the images that have a label there."""
    task, at, targets = _asked(parts, features.targets, head)
    rows = torch.cat([features.take(view, at).flatten(1).float() for view in range(views)])
    soft = task.soft_targets(parts.config.train.loss, targets.tolist())
    targets, soft = (torch.cat([column] * views) for column in (targets, soft))
    table = Table(rows, targets, soft, torch.arange(len(at)).repeat(views))
    device = parts.network.device  # but an Apple GPU has neither eigenvectors nor float64
    return Table(*(column.to("cpu" if device.type == "mps" else device) for column in table))
