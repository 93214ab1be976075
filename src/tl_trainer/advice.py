"""What to try next: the findings of a run, each with its evidence and a command. Pure: facts -> lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from tl_trainer.ground.wording import printable
from tl_trainer.metrics import Figures, wilson

MOST = 3
LEARNED, GAP = 0.98, 0.1  # train top-1 from which the head knows the images; its distance from that on val
IMBALANCE, BEHIND = 4, 0.2  # times as many images; recall below top-1
FEWEST_RECALLED = 3  # val images of a class whose recall says something
FALLING = 0.01  # of the validation loss, in the last epoch
WIDEST = 0.15  # of the 95% interval
FEWEST_FOLDS, MOST_FOLDS = 3, 10


@dataclass(frozen=True)
class Facts:
    """What is known when a run has ended.

    again, resume: the commands that repeat the run and go on with it. counts: the training images of each class.
    support, recalls: the val images of each class, and how many of these are right, a share. train: top-1 on the
    training images, None where it is not known. losses: of val, by epoch; empty for a head that was found. foldable:
    whether that is a linear head, which --folds can judge.
    """

    again: str
    resume: str
    classes: list[str]
    counts: list[int]
    support: list[int]
    recalls: list[float | None]
    val: Figures
    baseline: float
    backbone: str = "convnext_tiny"  # another than that of the run, or, where heads are found, a list of both
    train: float | None = None
    best_epoch: int = 0
    losses: tuple[float, ...] = ()
    phased: bool = False  # the run has phases, which say how long each trains
    searchable: bool = False  # the head was trained, and could be found
    foldable: bool = False
    balanced: bool = False  # classes have weights, or come equally often
    augmented: bool = False  # the train transform is random
    val_fraction: float | None = None  # None where val is the source's own

    @property
    def another(self) -> str:
        """The command for another backbone, whose stages and weights have other names."""
        return f"{self.again} 'model={{backbone: {self.backbone}}}'" + " 'train.phases=[]'" * self.phased


class Advice(NamedTuple):
    """A finding: what shows it, and what to do, mostly a command."""

    evidence: str
    remedy: str


def advise(facts: Facts) -> list[Advice]:
    """The findings that matter most, at most MOST."""
    return [advice for rule in RULES if (advice := rule(facts))][:MOST]


def near_baseline(facts: Facts) -> Advice | None:
    """The lower end of the interval does not exceed the majority baseline."""
    top1 = facts.val["top1"]
    if top1 == 1 or wilson(top1, int(facts.val["n"]))[0] > facts.baseline:
        return None
    evidence = f"val top-1 is {top1:.1%}, and always saying the most frequent class gives {facts.baseline:.1%}"
    return Advice(f"{evidence}: check the labels, or try another backbone", facts.another)


def memorised(facts: Facts) -> Advice | None:
    """The training images are memorised, the validation images are not.

    Random views are advised only for a head that was trained: a search chooses a strength of L2 that does as much.
    """
    top1 = facts.val["top1"]
    if facts.train is None or facts.train < LEARNED or facts.train - top1 < GAP:
        return None
    evidence = f"train top-1 is {facts.train:.1%}, val top-1 {top1:.1%}: the head has memorised the training images"
    if facts.augmented or not facts.losses:
        return Advice(f"{evidence}; another backbone may help, or more photographs", facts.another)
    return Advice(evidence, f"{facts.again} transforms.train=default")


def imbalanced(facts: Facts) -> Advice | None:
    """The smallest class has far fewer images than the largest, and is missed far more often than the others."""
    least = min(range(len(facts.counts)), key=lambda index: facts.counts[index])
    recall, most = facts.recalls[least], max(facts.counts)
    if facts.balanced or recall is None or facts.support[least] < FEWEST_RECALLED:
        return None
    if most < IMBALANCE * facts.counts[least] or recall > facts.val["top1"] - BEHIND:
        return None
    name = printable(facts.classes[least])
    return Advice(
        f"{name} has {facts.counts[least]:,} training images, the largest class {most:,}; recall of {name} on val is "
        f"{recall:.1%}",
        f"{facts.again} train.loss.class_weights=balanced",
    )


def improving(facts: Facts) -> Advice | None:
    """The last epoch is the best, and its validation loss still falls."""
    epochs = len(facts.losses)
    if (
        facts.phased
        or epochs < 2
        or facts.best_epoch != epochs
        or facts.losses[-1] > (1 - FALLING) * min(facts.losses[:-1])
    ):
        return None
    return Advice(
        f"epoch {epochs}, the last, is the best; its val loss is {facts.losses[-1]:.4f}, before it "
        f"{facts.losses[-2]:.4f}",
        f"{facts.resume} --epochs {2 * epochs}",
    )


def not_searched(facts: Facts) -> Advice | None:
    """The head was trained with one set of values, though the best linear head could be found."""
    if not facts.searchable or facts.val["top1"] == 1:
        return None
    return Advice(
        f"the head was trained for {len(facts.losses)} epochs; no other learning rate or weight decay was compared",
        f"{facts.again} train.search=auto",
    )


def few_validation_images(facts: Facts) -> Advice | None:
    """The interval of the validation top-1 is wide."""
    images = int(facts.val["n"])
    low, high = wilson(facts.val["top1"], images)
    if high - low <= WIDEST:
        return None
    evidence = f"{images:,} val images: the 95% interval of top-1 is {low:.1%} to {high:.1%}"
    if facts.val_fraction is not None and facts.foldable and (folds := _folds(facts)) >= FEWEST_FOLDS:
        return Advice(f"{evidence}; cross-validation judges all images", f"{facts.again} --folds {folds}")
    if facts.val_fraction is not None and facts.val_fraction < 0.4:
        return Advice(evidence, f"{facts.again} data.val_fraction=0.4")
    return Advice(evidence, "add images to val, or move some of train there")


def _folds(facts: Facts) -> int:
    """As many as the smallest class has images, at most MOST_FOLDS."""
    return min(MOST_FOLDS, *map(sum, zip(facts.counts, facts.support, strict=True)))


RULES: tuple[Callable[[Facts], Advice | None], ...] = (
    near_baseline, not_searched, memorised, imbalanced, improving, few_validation_images,
)  # fmt: skip
