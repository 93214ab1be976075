"""The task of images that have one class each: its loss, its figures, its rows, its val split and folds."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from torch.nn.functional import one_hot
from typing_extensions import TypedDict

from tl_trainer import metrics
from tl_trainer.config.training import LossSection
from tl_trainer.errors import DataError
from tl_trainer.ground.wording import listed, printable
from tl_trainer.metrics import CURVES, Activation, Figures, Prediction, Scores, is_better
from tl_trainer.plots import confusion_figure, reliability_figure
from tl_trainer.stratification import with_copies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FINEST = 20  # parts into which groups are divided for a val split: the time grows with its square
CLASSES_NAMED = 5  # in a message
SEEDS = 2**32  # that scikit-learn takes
ATTEMPTS = 10  # draws, of which the first is taken that leaves every class on both sides


_Share = Annotated[float, Field(ge=0, le=1)]


class _TopK(TypedDict):
    loss: Annotated[float, Field(allow_inf_nan=False)]
    top1: _Share
    top5: _Share
    n: Annotated[int, Field(ge=1)]


class SingleLabel:
    """Each image has one class, and a target is its index."""

    kind = "single"
    shown = ("top1", "top-1")  # the figure that a run is told by: its key, and its name
    of_absent = (  # what the figures make of a class without an image
        "recalls and balanced accuracy are over the other classes, and in macro F1 such a class counts as 0 where it "
        "was predicted"
    )
    columns: tuple[str, ...] = ("loss", "top1", "top5")  # of the figures, those in metrics.csv and TensorBoard

    def __init__(self, classes: Sequence[str], best: str = "top1", stop: str | None = None) -> None:
        """best: of `metrics.HIGHER`, the figure by which an epoch is the best; stop: the one that may end a phase."""
        self.classes, self.best = list(classes), best
        self.averages = [name for name in dict.fromkeys((best, stop)) if name in metrics.AVERAGES]
        self.columns = (*self.columns, *self.averages)

    def hold_out(
        self,
        targets: Sequence[int],
        fraction: float,
        seed: int,
        name: Callable[[int], str] = str,
        groups: Sequence[str] = (),
    ) -> set[int]:
        """The indices of a validation split, drawn from each class. `name` gives what the image at an index is called.

        groups: of the images, if any; none of them is divided, and the fraction is met as nearly as they allow. Raises
        DataError, naming them, for classes of fewer than two images or groups.
        """
        if groups:
            most = self._fewest_groups(targets, groups)
            share = Fraction(fraction).limit_denominator(min(most, FINEST))
            parts, of_val = max(share.denominator, 2), max(share.numerator, 1)
            if share.numerator in (0, share.denominator):  # too few groups for so small a part
                parts, of_val = most, 1 if share.numerator == 0 else most - 1
            fold = self._grouped(targets, groups, (parts, of_val), seed)
            return {index for index, number in enumerate(fold) if number < of_val}
        rng = random.Random(seed)
        by_class: dict[int, list[int]] = {label: [] for label in range(len(self.classes))}
        for index, label in enumerate(targets):
            by_class[label].append(index)
        if few := [label for label, indices in by_class.items() if len(indices) < 2]:
            files = (name(by_class[label][0]) if by_class[label] else "none" for label in few[:CLASSES_NAMED])
            listing = ", ".join(f"{self.classes[label]!r} ({file})" for label, file in zip(few, files, strict=False))
            more = f" and {len(few) - CLASSES_NAMED} more" if len(few) > CLASSES_NAMED else ""
            raise DataError(
                f"a val split needs 2 images of each class or more, and there are too few of {listing}{more}; add "
                "some, remove the class, or bring a val split"
            )
        held_out: set[int] = set()
        for indices in by_class.values():
            count = min(max(1, round(len(indices) * fraction)), len(indices) - 1)
            held_out.update(rng.sample(indices, count))
        return held_out

    def folds(
        self,
        targets: Sequence[int],
        count: int,
        seed: int,
        groups: Sequence[str] = (),
        hashes: Sequence[bytes] = (),
    ) -> list[int]:
        """The fold of each image, 0 to count - 1: of each class about as many images in every one.

        groups: of the images, if any; none of them is divided. hashes: of their contents, if known; copies share
        a fold, and so do their groups. Raises DataError, naming them, for classes of fewer images than folds, and for
        groups that cannot be divided into so many.
        """
        from sklearn.model_selection import StratifiedKFold

        images = Counter(targets)
        if few := [f"{name!r} ({images[label]})" for label, name in enumerate(self.classes) if images[label] < count]:
            raise DataError(
                f"{count} folds need {count} images of each class or more, and there are fewer of {listed(few)}; use "
                "fewer folds, add images, or remove the class"
            )
        if groups:
            groups = with_copies(groups, hashes)
            self._fewest_groups(targets, groups)
            return self._grouped(targets, groups, (count, 0), seed)
        rows, first = list(targets), dict[bytes, int]()
        splitter = StratifiedKFold(count, shuffle=True, random_state=seed % SEEDS)
        fold = _numbered(splitter.split(rows, rows), len(rows))
        fold = [first.setdefault(digest, of) for digest, of in zip(hashes, fold, strict=True)] if hashes else fold
        if len({*fold}) < count:
            raise DataError(f"too many images are copies to divide them into {count} folds; remove these, or use fewer")
        return fold

    def _fewest_groups(self, targets: Sequence[int], groups: Sequence[str]) -> int:
        """In how many groups the class in the fewest is; DataError for one that is in a single group."""
        of_class: dict[int, set[str]] = {label: set() for label in range(len(self.classes))}
        for label, group in zip(targets, groups, strict=True):
            of_class[label].add(group)
        if single := [label for label, found in of_class.items() if len(found) < 2]:
            held = [f"{self.classes[label]!r} ({', '.join(of_class[label]) or 'no image'})" for label in single]
            raise DataError(
                f"all images of {listed(held)} are in one group, which cannot be divided; add images of another group, "
                "remove the class, or bring a val split"
            )
        return min(map(len, of_class.values()))

    def _grouped(self, targets: Sequence[int], groups: Sequence[str], parts: tuple[int, int], seed: int) -> list[int]:
        """The number of each image among `parts[0]` that divide no group.

        Every class is both in and outside the first `parts[1]` of them, and where that is 0 outside of each. Raises
        DataError where no such division is found.
        """
        from sklearn.model_selection import StratifiedGroupKFold

        (count, first), rows, every = parts, list(targets), set(targets)
        for attempt in range(ATTEMPTS if count <= len({*groups}) else 0):
            splitter = StratifiedGroupKFold(count, shuffle=True, random_state=(seed + attempt) % SEEDS)
            pairs = [*zip(rows, fold := _numbered(splitter.split(rows, rows, groups), len(rows)), strict=True)]
            sides = [{label for label, of in pairs if of != number} for number in range(count)]
            if first:
                sides = [{label for label, of in pairs if (of < first) == held_out} for held_out in (False, True)]
            if all(side == every for side in sides) and len({*fold}) == count:
                return fold
        raise DataError(
            f"{len({*groups})} groups cannot be divided into {count} parts that leave every class something to learn "
            "from; take fewer folds, add groups, or bring a val split"
        )

    def criterion(self, section: LossSection, targets: Sequence[int]) -> nn.Module:
        """The loss: (logits (N, classes), targets (N,)) -> the batch's mean cross-entropy."""
        balanced = section.class_weights == "balanced"
        weights = metrics.class_weights(list(targets), len(self.classes)) if balanced else None
        return nn.CrossEntropyLoss(weights, label_smoothing=section.label_smoothing)

    def soft_targets(self, section: LossSection, targets: Sequence[int]) -> Tensor:
        """(N, classes): the weights with which the loss of each image counts its classes, those of `criterion`."""
        classes, smoothing = len(self.classes), section.label_smoothing
        rows = one_hot(torch.tensor(targets), classes) * (1 - smoothing) + smoothing / classes
        return rows if section.class_weights == "none" else rows * metrics.class_weights(list(targets), classes)

    def figures(self, scores: Scores) -> Figures:
        """The figures of an epoch: `loss`, `n` (images), and those in `columns`."""
        found = metrics.figures(scores)
        if self.averages:
            rows = metrics.per_class(scores, self.classes)
            found |= {name: metrics.AVERAGES[name](rows) for name in self.averages}
        return found

    @property
    def guessing_loss(self) -> float:
        """The loss of a classifier that holds every class for equally likely."""
        return math.log(len(self.classes))

    def check(self, figures: Any) -> None:
        """Raise ValueError for what `figures` cannot have given."""
        TypeAdapter(_TopK).validate_python(figures, strict=True)
        TypeAdapter(dict[str, _Share]).validate_python({name: figures.get(name) for name in self.averages}, strict=True)

    def better(self, figures: Figures, best: Figures, by: str | None = None, least: float = 0.0) -> bool:
        """Whether `figures` beat `best` by more than `least` in the figure `by`, which is that of the best epoch where
        it is not given; where that much is 0, the lower loss decides between equal ones.
        """
        return is_better(figures, best, self.best if by is None else by, least)

    @property
    def best_in_words(self) -> str:
        """The figure by which an epoch is the best, and what decides between equal ones."""
        words = {"top1": "top-1", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1"}
        return f"{words[self.best]}, then loss" if self.best in words else self.best

    def in_words(self, figures: Figures) -> str:
        """The figures on one line, without the loss; of five classes the first five are always right."""
        words = {"balanced_accuracy": "balanced", "macro_f1": "macro F1"}
        top5 = f"  top-5 {figures['top5']:5.1%}" if len(self.classes) > 5 and not self.averages else ""
        averages = (f"  {words[name]} {figures[name]:5.1%}" for name in self.averages)
        return f"top-1 {figures['top1']:5.1%}{top5}{''.join(averages)}"

    def calibration(self, scores: Scores) -> float | None:
        """The temperature, which calibrates the probabilities; None where too few images tell."""
        return metrics.fit_temperature(scores)

    def averaged(self, views: Sequence[Tensor]) -> Tensor:
        """The logits of several views of the same images, each (N, classes), as those of their mean probability."""
        return metrics.averaged(views)

    def probabilities(self, logits: Tensor, temperature: float | None) -> Tensor:
        """(N, classes) float64."""
        return metrics.probabilities(logits, temperature)

    def activations(self, temperature: float | None) -> list[Activation]:
        """How an export makes probabilities of the logits."""
        return [Activation(len(self.classes), temperature or 1.0, several=False)]

    def labels(self, logits: Tensor, temperature: float | None) -> None:
        """None: an image has one label, the first of `predictions`."""

    def blocks(self, logits: Tensor, temperature: float | None, count: int) -> None:
        """None: there is one head."""

    def predictions(self, logits: Tensor, temperature: float | None, count: int) -> list[list[Prediction]]:
        """What tl-predict shows of each image: at most `count` classes, the most probable first."""
        best = metrics.ranked(logits, count)
        shares = metrics.probabilities(logits, temperature).gather(1, best)
        return [
            [Prediction(self.classes[index], index, round(share, 6)) for index, share in zip(*row, strict=True)]
            for row in zip(best.tolist(), shares.tolist(), strict=True)
        ]

    def measure(self, scores: Scores, temperature: float | None, withheld: str | None) -> dict[str, Any]:
        """All figures of an evaluation as plain data; `withheld`: why those with the temperature are not given."""
        return metrics.measure(scores, self.classes, temperature, withheld)

    def caption(self, target: int) -> str:
        """A label in words."""
        return self.classes[target]

    def mistakes(self, scores: Scores, count: int) -> dict[int, str]:
        """The surest mistakes, surest first: an image's index, and what it was taken for."""
        said = scores.logits.argmax(dim=1).tolist()
        return {index: self.classes[said[index]] for index in self.wrong(scores)[:count]}

    def wrong(self, scores: Scores, _: float | None = None) -> list[int]:
        """The images that are put into a wrong class, the surest first."""
        return metrics.surest_mistakes(scores, None, len(scores.targets))

    def curves(self, scores: Scores) -> dict[str, float]:
        """What TensorBoard shows of each class: F1, where it is defined and the classes are not too many."""
        if len(self.classes) > CURVES:
            return {}
        rows = metrics.per_class(scores, self.classes)
        return {f"f1/{printable(row['class'])}": row["f1"] for row in rows if row["f1"] is not None}

    def pictures(self, scores: Scores, temperature: float | None = None) -> Iterator[tuple[str, Figure]]:
        """The pictures of an evaluation, by name; `temperature` is shown beside what was trained, if given."""
        yield "confusion_matrix", confusion_figure(metrics.confusion(scores, len(self.classes)), self.classes)
        curves = {"as trained": metrics.reliability(scores, None)}
        if temperature is not None:
            curves["with temperature"] = metrics.reliability(scores, temperature)
        yield "reliability", reliability_figure(curves)

    def precision_recall(self, scores: Scores) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each class, unless they are too many: its name, the images of it (N,), their probabilities of it (N,)."""
        if len(self.classes) <= CURVES:
            shares, labels = metrics.probabilities(scores.logits, None), one_hot(scores.targets, len(self.classes))
            for index, name in enumerate(self.classes):
                yield name, labels[:, index], shares[:, index]


def _numbered(parts: Iterable[tuple[Iterable[int], Iterable[int]]], images: int) -> list[int]:
    """scikit-learn's folds, each as indices of the others and its own -> the number of each image's."""
    fold = [0] * images
    for number, (_, own) in enumerate(parts):
        for index in own:
            fold[index] = number
    return fold
