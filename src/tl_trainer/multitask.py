"""The task of several questions about an image: a head for each over the same features, with its own classes.

The classes of all heads are one list, in which each is called after its head: `species=cat` where an image has one of
them, `tags:wet` where it may have several. A target is as that of `multilabel`; where a head has no label all of its
classes are UNKNOWN, and the image counts for nothing in its loss and its figures.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor, nn
from typing_extensions import TypedDict

from tl_trainer import label_metrics, metrics
from tl_trainer.checkpoint import Calibration
from tl_trainer.config.training import LossSection, TrainSection
from tl_trainer.data.label_texts import HAS, IS, heads_in
from tl_trainer.metrics import Activation, Figures, Prediction, Scores, is_better
from tl_trainer.multilabel import WORDS as LABEL_WORDS
from tl_trainer.multilabel import MultiLabel
from tl_trainer.plots import reliability_figure
from tl_trainer.single_label import SingleLabel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WORDS = {"top1": "top-1", "balanced_accuracy": "balanced", **LABEL_WORDS}
TINY = torch.finfo(torch.float32).tiny
COMMON = ("precision", "recall", "f1", "support", "predicted")  # of the figures of a class, those that every head has


class _Figures(TypedDict):
    loss: Annotated[float, Field(allow_inf_nan=False)]
    mean: Annotated[float, Field(ge=0, le=1)]
    n: Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Block:
    """What a head says of an image: its most probable classes, and of a head with several labels those above their
    threshold."""

    predictions: list[Prediction]
    labels: list[Prediction] | None

    @property
    def said(self) -> list[Prediction]:
        """The class, or the labels above their threshold."""
        return self.predictions[:1] if self.labels is None else self.labels


@dataclass(frozen=True)
class Head:
    """A question: its name, its task, which of all classes are its own, how much it counts in the loss and the mean."""

    name: str
    task: SingleLabel | MultiLabel
    of: slice
    weight: float = 1.0

    @property
    def names(self) -> list[str]:
        """Its classes as the list of all has them."""
        sign = IS if self.task.kind == "single" else HAS
        return [f"{self.name}{sign}{name}" for name in self.task.classes]

    @property
    def figure(self) -> str:
        """The one by which it is judged."""
        return self.task.best

    def own(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which images (N,) have a label here, and their targets as its task has them."""
        targets = targets[:, self.of]
        rows = label_metrics.known(targets).any(dim=1)
        return rows, targets[rows].argmax(dim=1) if self.task.kind == "single" else targets[rows]

    def part(self, scores: Scores) -> Scores:
        """The scores of the images that have a label here."""
        rows, targets = self.own(scores.targets)
        return Scores(scores.logits[rows, self.of], targets)


class HeadsLoss(nn.Module):
    """The weighted sum of the losses of the heads, each over the images that have a label there.

    The cross-entropies of all heads with one class per image are computed at once: for as small a layer as a head many
    small steps would take longer than the layer. weights: (classes,) of each class in its own head, 1 where none is
    asked for. smoothing: the mass that is spread over the classes of such a head.
    """

    class_weights: Tensor
    head_weights: Tensor
    spread: Tensor

    def __init__(self, heads: Sequence[Head], binary: Sequence[nn.Module], weights: Tensor, smoothing: float) -> None:
        super().__init__()
        self.smoothing, self.binary = smoothing, nn.ModuleList(binary)
        self.several = [head for head in heads if head.task.kind != "single"]
        single = [head for head in heads if head.task.kind == "single"]
        self.sizes = [head.of.stop - head.of.start for head in single]
        self.columns = [at for head in single for at in range(head.of.start, head.of.stop)]
        self.in_order = self.columns == [*range(len(self.columns))]  # so that no column has to be picked
        member = torch.zeros(len(self.columns), len(single))
        for number, part in enumerate(torch.split(torch.arange(len(self.columns)), self.sizes) if single else ()):
            member[part, number] = 1
        self.register_buffer("class_weights", member * weights[self.columns, None])  # (columns, heads)
        self.register_buffer("head_weights", torch.tensor([head.weight for head in single]))
        self.register_buffer("spread", smoothing / member.sum(dim=0)[member.argmax(dim=1)] if single else member)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        total = self._cross_entropies(logits, targets) if self.sizes else logits.new_zeros(())
        for head, criterion in zip(self.several, self.binary, strict=True):
            total = total + head.weight * criterion(logits[:, head.of], targets[:, head.of])
        return total

    def _cross_entropies(self, logits: Tensor, targets: Tensor) -> Tensor:
        if not (self.in_order and len(self.columns) == logits.shape[1]):
            logits, targets = logits[:, self.columns], targets[:, self.columns]
        wanted = targets.clamp(min=0).float()
        weights = wanted.sum(dim=0) @ self.class_weights  # (heads,): those of the labels in this batch
        factors = self.head_weights * (weights > 0) / weights.clamp(min=TINY)
        if self.smoothing:
            wanted = wanted * (1 - self.smoothing) + label_metrics.known(targets).float() * self.spread
        parts = torch.split(logits.float(), self.sizes, dim=1)
        log_shares = torch.cat([part.log_softmax(dim=1) for part in parts], dim=1)
        return -(wanted * (self.class_weights @ factors) * log_shares).sum()


class MultiTask:
    """Each image has a class, or any number of labels, for each head."""

    kind = "multitask"
    shown = ("mean", "mean")
    of_absent = (
        "a head's figures are over its other classes, but in macro F1 such a class counts as 0 where it was predicted; "
        "a head without any image counts for nothing in the mean"
    )

    def __init__(self, heads: Sequence[Head], best: str = "mean", stop: str | None = None) -> None:
        """best, stop: mean, the weighted mean of the figures by which the heads are judged, or loss."""
        self.heads, self.best, self.stop = list(heads), best, stop
        self.classes = [name for head in heads for name in head.names]
        self.flat = MultiLabel(self.classes)
        self.hold_out, self.folds, self.caption = self.flat.hold_out, self.flat.folds, self.flat.caption
        self.columns = ("loss", "mean", *(f"{head.name}/{head.figure}" for head in heads))

    def criterion(self, section: LossSection, targets: Sequence[Any]) -> nn.Module:
        """The loss: (logits (N, classes), targets (N, classes)) -> the weighted sum over the heads."""
        rows, weights, binary = torch.tensor(targets), torch.ones(len(self.classes)), []
        for head in self.heads:
            own = head.own(rows)[1].tolist()
            if head.task.kind != "single":
                binary.append(head.task.criterion(section, own))
            elif section.class_weights == "balanced":
                weights[head.of] = metrics.class_weights(own, len(head.task.classes))
        return HeadsLoss(self.heads, binary, weights, section.label_smoothing)

    def soft_targets(self, section: LossSection, targets: Sequence[Any]) -> Tensor:
        """Never: each head is searched for alone."""
        raise AssertionError("a head is searched for with its own task")

    def figures(self, scores: Scores) -> Figures:
        """Those in `columns`, and `n`; a head without a label in these images counts for none."""
        found: Figures = {"loss": 0.0, "mean": 0.0, "n": len(scores.targets)}
        total = 0.0
        for head in self.heads:
            part = head.part(scores)
            own = head.task.figures(part) if len(part.targets) else {head.figure: 0.0, "loss": 0.0}
            found[f"{head.name}/{head.figure}"] = own[head.figure]
            found["loss"] += head.weight * own["loss"]
            if len(part.targets):
                found["mean"] += head.weight * own[head.figure]
                total += head.weight
        found["mean"] /= total or 1.0
        return found

    @property
    def guessing_loss(self) -> float:
        """The loss of a classifier that knows nothing."""
        return sum(head.weight * head.task.guessing_loss for head in self.heads)

    def check(self, figures: Any) -> None:
        """Raise ValueError for what `figures` cannot have given."""
        known = figures if isinstance(figures, dict) else {}
        TypeAdapter(_Figures).validate_python({key: known.get(key) for key in ("loss", "mean", "n")}, strict=True)
        TypeAdapter(dict[str, float]).validate_python({key: known.get(key) for key in self.columns}, strict=True)

    def better(self, figures: Figures, best: Figures, by: str | None = None, least: float = 0.0) -> bool:
        """As for `SingleLabel`."""
        return is_better(figures, best, self.best if by is None else by, least)

    @property
    def best_in_words(self) -> str:
        """The figure by which an epoch is the best, and what decides between equal ones."""
        of = ", ".join(f"{WORDS[head.figure]} of {head.name}" for head in self.heads)
        return f"the mean of {of}, then loss" if self.best == "mean" else self.best

    def in_words(self, figures: Figures) -> str:
        """The figures on one line, without the loss."""
        heads = ((head, figures[f"{head.name}/{head.figure}"]) for head in self.heads)
        return "  ".join(f"{head.name} {WORDS[head.figure]} {value:5.1%}" for head, value in heads)

    def calibration(self, scores: Scores) -> Calibration:
        """The temperature of each head, None where too few images tell, and the thresholds of all classes."""
        temperatures: list[float | None] = []
        thresholds: list[float] = []
        for head in self.heads:
            part, found = head.part(scores), None
            if len(part.targets):
                found = head.task.calibration(part)
            if isinstance(found, Calibration):
                temperatures.append(found.temperature)
                thresholds += found.thresholds
            else:
                temperatures.append(found)
                thresholds += [label_metrics.HALF] * len(head.task.classes)
        return Calibration(temperatures if any(temperatures) else None, thresholds)

    def _calibrated(self, calibration: Calibration | None) -> Iterator[tuple[Head, Any]]:
        """The heads, each with its own temperature, or Calibration."""
        for number, head in enumerate(self.heads):
            if calibration is None:
                yield head, None
                continue
            temperature = calibration.temperature[number] if isinstance(calibration.temperature, list) else None
            several = head.task.kind != "single"
            yield head, Calibration(temperature, calibration.thresholds[head.of]) if several else temperature

    def averaged(self, views: Sequence[Tensor]) -> Tensor:
        """The logits of several views of the same images, each (N, classes), as those of their mean probabilities."""
        return torch.cat([head.task.averaged([view[:, head.of] for view in views]) for head in self.heads], dim=1)

    def probabilities(self, logits: Tensor, calibration: Calibration | None) -> Tensor:
        """(N, classes) float64; those of a head with one class per image have the sum 1."""
        own = self._calibrated(calibration)
        return torch.cat([head.task.probabilities(logits[:, head.of], cuts) for head, cuts in own], dim=1)

    def activations(self, calibration: Calibration | None) -> list[Activation]:
        """One for each head."""
        return [one for head, cuts in self._calibrated(calibration) for one in head.task.activations(cuts)]

    def blocks(self, logits: Tensor, calibration: Calibration | None, count: int) -> list[dict[str, Block]]:
        """What each head says of each image, with at most `count` of its classes."""
        rows: list[dict[str, Block]] = [{} for _ in logits]
        for head, cuts in self._calibrated(calibration):
            own = logits[:, head.of]
            labels = head.task.labels(own, cuts)
            for number, best in enumerate(head.task.predictions(own, cuts, count)):
                rows[number][head.name] = Block(best, None if labels is None else labels[number])
        return rows

    def predictions(self, logits: Tensor, calibration: Calibration | None, count: int) -> list[list[Prediction]]:
        """The class of each head, or its labels above their threshold, called as in `classes`."""
        return [
            [
                Prediction(head.names[one.index], head.of.start + one.index, one.probability)
                for head in self.heads
                for one in row[head.name].said
            ]
            for row in self.blocks(logits, calibration, 1)
        ]

    def said(self, logits: Tensor, calibration: Calibration | None) -> list[list[Prediction]]:
        """The same, without a number that limits them."""
        return self.predictions(logits, calibration, 1)

    def most_probable(self, logits: Tensor, calibration: Calibration | None, count: int) -> list[list[Prediction]]:
        """The classes of all heads with the highest probabilities, at most `count`."""
        shares = self.probabilities(logits, calibration)
        return [
            [Prediction(self.classes[at], at, round(of[at].item(), 6)) for at in row]
            for of, row in zip(shares, metrics.ranked(shares, count).tolist(), strict=True)
        ]

    def labels(self, logits: Tensor, calibration: Calibration | None) -> None:
        """None: they are in `blocks`."""

    def measure(self, scores: Scores, calibration: Calibration | None, withheld: str | None) -> dict[str, Any]:
        """All figures of an evaluation as plain data, those of each head in `heads`."""
        metrics.check_finite(scores.logits)
        heads = {
            head.name: head.task.measure(part, cuts, withheld)
            for head, cuts in self._calibrated(calibration)
            if len((part := head.part(scores)).targets)
        }
        rows = [
            {"class": name, **{key: row[key] for key in COMMON}}
            for head in self.heads
            if head.name in heads
            for name, row in zip(head.names, heads[head.name]["per_class"], strict=True)
        ]
        undefined = {
            f"heads {head.name}": "no image has a label of it" for head in self.heads if head.name not in heads
        }
        undefined |= {"calibration.after": withheld} if withheld is not None else {}
        return {
            **self.figures(scores),
            "calibration": {
                "temperature": None,  # each head has its own
                "before": _mean([of["calibration"]["before"] for of in heads.values()]),
                "after": _mean([of["calibration"]["after"] for of in heads.values()]) if withheld is None else None,
            },
            "most_confused": self._most_confused(heads),
            "heads": {name: {key: of[key] for key in of if key != "per_class"} for name, of in heads.items()},
            "per_class": rows,
            "undefined": undefined,
        }

    def _most_confused(self, heads: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The pairs of all heads, the most frequent first."""
        found = []
        for head in self.heads:
            names = dict(zip(head.task.classes, head.names, strict=True))
            for pair in heads[head.name]["most_confused"] if head.name in heads else ():
                found.append({**pair, "label": names[pair["label"]], "predicted": names[pair["predicted"]]})
        return sorted(found, key=lambda pair: -pair["count"])[: metrics.PAIRS]

    def wrong(self, scores: Scores, calibration: Calibration | None = None) -> list[int]:
        """The images with the surest mistakes of any head, surest first."""
        best: dict[int, int] = {}
        for head, cuts in self._calibrated(calibration):
            rows, _ = head.own(scores.targets)
            at, part = rows.nonzero()[:, 0].tolist(), head.part(scores)
            for rank, index in enumerate(head.task.wrong(part, cuts)):
                best[at[index]] = min(rank, best.get(at[index], rank))
        return sorted(best, key=lambda index: best[index])

    def mistakes(self, scores: Scores, count: int) -> dict[int, str]:
        """The surest mistakes, surest first: an image's index, and what was predicted for it."""
        wrong = self.wrong(scores)[:count]
        said = self.predictions(scores.logits[wrong], None, 1)
        return {index: ", ".join(one.label for one in row) for index, row in zip(wrong, said, strict=True)}

    def curves(self, scores: Scores) -> dict[str, float]:
        """What TensorBoard shows of each class of each head."""
        parts = ((head, head.part(scores)) for head in self.heads)
        return {
            f"{head.name}/{tag}": value
            for head, part in parts
            if len(part.targets)
            for tag, value in head.task.curves(part).items()
        }

    def pictures(self, scores: Scores, calibration: Calibration | None = None) -> Iterator[tuple[str, Figure]]:
        """The pictures of an evaluation, by name: one for each head, and how well the probabilities are calibrated."""
        curves = {}
        for head, cuts in self._calibrated(calibration):
            part = head.part(scores)
            if len(part.targets):
                name, figure = next(head.task.pictures(part))
                yield f"{name}_{head.name}", figure
                temperature = cuts.temperature if isinstance(cuts, Calibration) else cuts
                reliability = metrics.reliability if head.task.kind == "single" else label_metrics.reliability
                curves[head.name] = reliability(part, temperature)
        yield "reliability", reliability_figure(curves)

    def precision_recall(self, scores: Scores) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Of each class of each head, as for the heads alone."""
        for head in self.heads:
            part = head.part(scores)
            if len(part.targets):
                found = head.task.precision_recall(part)
                yield from ((f"{head.name}/{name}", there, shares) for name, there, shares in found)


def multitask(section: TrainSection, classes: Sequence[str]) -> MultiTask:
    """The task of these classes, which say what their heads are; section: says how much these count."""
    heads, start = [], 0
    for name, several, own in heads_in(classes):
        options = section.heads.get(name)
        weight, best = (options.weight, options.best) if options else (1.0, None)
        task = MultiLabel(own, best or "map", None, section.thresholds) if several else SingleLabel(own, best or "top1")
        heads.append(Head(name, task, slice(start, start + len(own)), weight))
        start += len(own)
    return MultiTask(heads, section.best, section.stop.metric)


def _mean(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each figure."""
    return {key: sum(of[key] for of in found) / len(found) for key in found[0]} if found else {}
