"""The task of images that may have any number of labels: its loss, its figures, its rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import TypedDict

from tl_trainer import label_metrics, metrics
from tl_trainer.checkpoint import Calibration
from tl_trainer.config.training import LossSection
from tl_trainer.data.label_texts import images_of_each
from tl_trainer.errors import DataError
from tl_trainer.ground.wording import listed, printable
from tl_trainer.metrics import CURVES, Activation, Figures, Prediction, Scores, is_better
from tl_trainer.plots import co_occurrence_figure, reliability_figure
from tl_trainer.stratification import stratified, with_copies

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {"map": "mAP", "macro_f1": "macro F1", "micro_f1": "micro F1"}
NO_LABEL = "no label"

_Share = Annotated[float, Field(ge=0, le=1)]


class _Figures(TypedDict):
    loss: Annotated[float, Field(allow_inf_nan=False)]
    map: _Share
    macro_f1: _Share
    micro_f1: _Share
    subset_accuracy: _Share
    n: Annotated[int, Field(ge=1)]


class BinaryLoss(nn.Module):
    """The mean binary cross-entropy of the labels that are known, (N, L) logits and targets; focal: its gamma.

    weights: (L,) of a label that is there, 1 where None. The focal loss is that of Lin et al. (ICCV 2017).
    """

    def __init__(self, weights: Tensor | None, focal: float | None) -> None:
        super().__init__()
        self.register_buffer("weights", weights)
        self.focal = focal

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        there, known = (targets == 1).to(logits), label_metrics.known(targets).to(logits)
        losses = functional.binary_cross_entropy_with_logits(logits, there, reduction="none")
        if self.focal is not None:
            losses = losses * (1 - (-losses).exp()) ** self.focal
        if isinstance(self.weights, Tensor):
            known = known * torch.where(there > 0, self.weights, 1.0)
        return (losses * known).sum() / label_metrics.known(targets).sum().clamp(min=1)


class MultiLabel:
    """Each image has any number of labels; a target is as `data.label_texts` has it."""

    kind = "multilabel"
    of_absent = (
        "mean average precision is over the other labels, and in macro F1 such a label counts as 0 where it was "
        "predicted"
    )
    shown = ("map", "mAP")
    columns: tuple[str, ...] = ("loss", "map", "macro_f1", "micro_f1", "subset_accuracy")

    def __init__(
        self, classes: Sequence[str], best: str = "map", stop: str | None = None, thresholds: str | float = "f1"
    ) -> None:
        """best, stop: as for `SingleLabel`, of `metrics.HIGHER`. thresholds: as `train.thresholds`."""
        self.classes, self.best, self.stop, self.rule = list(classes), best, stop, thresholds

    def hold_out(
        self,
        targets: Sequence[Any],
        fraction: float,
        seed: int,
        name: Callable[[int], str] = str,
        groups: Sequence[str] = (),
    ) -> set[int]:
        """The indices of a validation split that has its share of each label; no group is divided.

        Raises DataError where one of both sides would be empty.
        """
        part = stratified(np.array(targets), [fraction, 1 - fraction], seed, groups)
        if not 0 < sum(part) < len(part):
            raise DataError(f"{len(part)} images, or their groups, are too few for a val split; add some, or bring one")
        held_out = {index for index, number in enumerate(part) if number == 0}
        learned = images_of_each(
            (target for index, target in enumerate(targets) if index not in held_out), len(self.classes)
        )
        if missing := [label for label, count in zip(self.classes, learned, strict=True) if not count]:
            raise DataError(
                f"all images with {listed([*map(repr, missing)])} are in the val split that was drawn; add images with "
                "it, of another group if there are groups, remove the label, or bring a val split"
            )
        return held_out

    def folds(
        self,
        targets: Sequence[Any],
        count: int,
        seed: int,
        groups: Sequence[str] = (),
        hashes: Sequence[bytes] = (),
    ) -> list[int]:
        """The fold of each image; no group is divided, and copies share one. Raises DataError for too few of them."""
        together = with_copies(groups, hashes) if groups else hashes
        fold = stratified(np.array(targets), [1 / count] * count, seed, together)
        if len({*fold}) < count:
            raise DataError(f"too few images, or groups of them, to divide into {count} folds; use fewer, or add some")
        return fold

    def _weights(self, section: LossSection, targets: Sequence[Any]) -> Tensor | None:
        """(L,) how many images are without each label for one with it, where that is asked for."""
        if section.class_weights == "none":
            return None
        rows = torch.tensor(targets)
        return (rows == 0).sum(dim=0) / (rows == 1).sum(dim=0).clamp(min=1)

    def criterion(self, section: LossSection, targets: Sequence[Any]) -> nn.Module:
        """The loss: (logits (N, L), targets (N, L)) -> a mean over the labels that are known."""
        return BinaryLoss(self._weights(section, targets), section.focal)

    def soft_targets(self, section: LossSection, targets: Sequence[Any]) -> Tensor:
        """(N, L, 2): the weights of each image without and with each label, both 0 where it is not known."""
        rows, weights = torch.tensor(targets), self._weights(section, targets)
        having = (rows == 1).float() * (1.0 if weights is None else weights)
        return torch.stack([(rows == 0).float(), having], dim=2)

    def figures(self, scores: Scores) -> Figures:
        """Those in `columns`, and `n`; a label is predicted from a probability of 0.5 on."""
        return label_metrics.figures(scores)

    @property
    def guessing_loss(self) -> float:
        """The loss of a classifier that takes every label for as likely as not."""
        return math.log(2)

    def check(self, figures: Any) -> None:
        """Raise ValueError for what `figures` cannot have given."""
        TypeAdapter(_Figures).validate_python(figures, strict=True)

    def better(self, figures: Figures, best: Figures, by: str | None = None, least: float = 0.0) -> bool:
        """As for `SingleLabel`."""
        return is_better(figures, best, self.best if by is None else by, least)

    @property
    def best_in_words(self) -> str:
        """The figure by which an epoch is the best, and what decides between equal ones."""
        return f"{WORDS[self.best]}, then loss" if self.best in WORDS else self.best

    def in_words(self, figures: Figures) -> str:
        """The figures on one line, without the loss."""
        return f"mAP {figures['map']:5.1%}  macro F1 at 0.5 {figures['macro_f1']:5.1%}"

    def calibration(self, scores: Scores) -> Calibration:
        """The temperature of all labels, None where too few images tell, and the threshold of each."""
        temperature = label_metrics.fit_temperature(scores)
        return Calibration(temperature, label_metrics.fit_thresholds(scores, temperature, self.rule))

    def averaged(self, views: Sequence[Tensor]) -> Tensor:
        """The logits of several views of the same images, each (N, L), as those of their mean probability."""
        if len(views) == 1:
            return views[0]
        stacked = torch.stack([view.cpu().double() for view in views])
        there, absent = (functional.logsigmoid(sign * stacked).logsumexp(dim=0) for sign in (1, -1))
        return (there - absent).float()

    def probabilities(self, logits: Tensor, calibration: Calibration | None) -> Tensor:
        """(N, L) float64."""
        return label_metrics.probabilities(logits, calibration.temperature if calibration else None)

    def activations(self, calibration: Calibration | None) -> list[Activation]:
        """As for `SingleLabel`."""
        temperature = calibration.temperature if calibration else None
        return [Activation(len(self.classes), temperature or 1.0, several=True)]

    def predictions(self, logits: Tensor, calibration: Calibration | None, count: int) -> list[list[Prediction]]:
        """What tl-predict shows of each image: at most `count` labels, the most probable first."""
        shares, best = self.probabilities(logits, calibration), metrics.ranked(logits, count)
        return [[self._prediction(of, at) for at in row] for of, row in zip(shares, best.tolist(), strict=True)]

    most_probable = predictions

    def labels(self, logits: Tensor, calibration: Calibration | None) -> list[list[Prediction]]:
        """The labels of each image, those from their threshold on, the most probable first."""
        shares, best = self.probabilities(logits, calibration), metrics.ranked(logits, len(self.classes)).tolist()
        said = self._said(shares, calibration)
        return [
            [self._prediction(of, at) for at in row if above[at]]
            for of, row, above in zip(shares, best, said.tolist(), strict=True)
        ]

    said = labels

    def blocks(self, logits: Tensor, calibration: Calibration | None, count: int) -> None:
        """None: there is one head."""

    def _said(self, shares: Tensor, calibration: Calibration | None) -> Tensor:
        """(N, L) bool."""
        thresholds = calibration.thresholds if calibration else [label_metrics.HALF] * len(self.classes)
        return label_metrics.above(shares, thresholds)

    def _prediction(self, shares: Tensor, index: int) -> Prediction:
        return Prediction(self.classes[index], index, round(shares[index].item(), 6))

    def measure(self, scores: Scores, calibration: Calibration | None, withheld: str | None) -> dict[str, Any]:
        """All figures of an evaluation as plain data; `withheld`: why those with the temperature are not given."""
        return label_metrics.measure(scores, self.classes, calibration, withheld)

    def caption(self, target: Sequence[int]) -> str:
        """The labels in words."""
        there = [name for name, value in zip(self.classes, target, strict=True) if value == 1]
        return ", ".join(there) or NO_LABEL

    def mistakes(self, scores: Scores, count: int) -> dict[int, str]:
        """The surest mistakes, surest first: an image's index, and what was predicted for it."""
        return {index: self.caption((scores.logits[index] >= 0).tolist()) for index in self.wrong(scores)[:count]}

    def wrong(self, scores: Scores, calibration: Calibration | None = None) -> list[int]:
        """The images with a label that is wrong, those of the highest loss of one label first."""
        said, targets = self._said(self.probabilities(scores.logits, calibration), calibration), scores.targets
        wrong = (label_metrics.known(targets) & (said != (targets == 1))).any(dim=1)
        worst = label_metrics.entry_losses(*scores).amax(dim=1)
        order = worst.sort(descending=True, stable=True).indices.tolist()
        return [index for index in order if wrong[index]]

    def curves(self, scores: Scores) -> dict[str, float]:
        """What TensorBoard shows of each label: its average precision, where the labels are not too many."""
        if len(self.classes) > CURVES:
            return {}
        found = zip(self.classes, label_metrics.average_precisions(*scores), strict=True)
        return {f"ap/{printable(name)}": value for name, value in found if value is not None}

    def pictures(self, scores: Scores, calibration: Calibration | None = None) -> Iterator[tuple[str, Figure]]:
        """The pictures of an evaluation, by name; the temperature is shown beside what was trained, if given."""
        yield "co_occurrence", co_occurrence_figure(label_metrics.co_occurrence(scores.targets), self.classes)
        curves = {"as trained": label_metrics.reliability(scores, None)}
        if calibration is not None and calibration.temperature is not None:
            curves["with temperature"] = label_metrics.reliability(scores, calibration.temperature)
        yield "reliability", reliability_figure(curves)

    def precision_recall(self, scores: Scores) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each label, unless they are too many: its name, and of the images where it is known whether they have it
        and its probability.
        """
        if len(self.classes) <= CURVES:
            shares = label_metrics.probabilities(scores.logits, None)
            for index, name in enumerate(self.classes):
                there = label_metrics.known(scores.targets[:, index])
                yield name, scores.targets[there, index], shares[there, index]
