"""Will more photographs help: the head that was found, solved again on fewer images, and the accuracy at twice as many.

The error follows a power law, scale * images ** -exponent + floor (Hestness et al., "Deep learning scaling is
predictable, empirically", 2017; Viering & Loog, "The shape of learning curves", 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tl_trainer.assembly import Setup
from tl_trainer.candidates import Row
from tl_trainer.comparison import FEWEST_VAL
from tl_trainer.features import FeatureBatches, Features
from tl_trainer.feeds import Feed
from tl_trainer.ground.machine import threads_for
from tl_trainer.logistic import Axes, path
from tl_trainer.search import table_of
from tl_trainer.tables import SCALINGS, Table

PARTS = (0.1, 0.2, 0.4, 0.7, 1.0)  # of the training images
DRAWS = 5
LEFT_OUT = 0.2  # of the training images of a draw, where the validation images are few
FEWEST_SIZES = 4  # that have an image of each class: the power law has three parameters
FEWEST_PER_CLASS = 5  # images, on average
WORK = 10**8  # rows * principal axes * classes * draws, of one size: some two seconds
EXPONENTS = torch.linspace(0.1, 1.5, 57, dtype=torch.float64)
RESAMPLED = 400  # times, for the interval


class PowerLaw(NamedTuple):
    """error = scale * images ** -exponent + floor, of each curve that was fitted (B,)."""

    scale: Tensor
    exponent: Tensor
    floor: Tensor

    def __call__(self, images: float) -> Tensor:
        """The error (B,) of a head that was trained on so many images."""
        return self.scale * images**-self.exponent + self.floor


class Curve(NamedTuple):
    """What was measured: wrong (S, D, M) says whether image m was put into a wrong class by the head of draw d.

    sizes: how many images a head was trained on (S). judges (D, M): 1 where an image may judge the heads of a draw, 0
    where they were trained on it.
    """

    sizes: list[int]
    wrong: Tensor
    judges: Tensor

    def errors(self, draws: Tensor, images: Tensor) -> Tensor:
        """The error at each size (B, S), where draws (B, D) and images (B, M) say how often each counts."""
        weights = torch.einsum("bd,bm,dm->bdm", draws, images, self.judges).flatten(1)
        return weights @ self.wrong.flatten(1).T / weights.sum(dim=1, keepdim=True)

    @property
    def of_draws(self) -> Tensor:
        """(S, D): the error of each draw's head."""
        return (self.wrong * self.judges).sum(dim=2) / self.judges.sum(dim=1)


@dataclass(frozen=True)
class Forecast:
    """The learning curve, the law fitted to it, and the 95% interval of the accuracy at twice the images.

    images: those of the training split. judged: what the heads were judged by, in words.
    """

    curve: Curve
    law: PowerLaw
    images: int
    interval: tuple[float, float]
    judged: str

    def accuracy(self, images: float) -> float:
        """What the law says, a share."""
        return 1 - self.law(images).item()

    @property
    def measured(self) -> dict[int, list[float]]:
        """The accuracy of each draw's head, by how many images it was trained on."""
        return {
            size: [1 - error for error in errors]
            for size, errors in zip(self.curve.sizes, self.curve.of_draws.tolist(), strict=True)
        }

    def line(self, points: int = 50) -> list[tuple[float, float]]:
        """(images, accuracy) along the law, from the smallest size to twice the images."""
        least, most = self.curve.sizes[0], 2 * self.images
        counts = [least * (most / least) ** (step / (points - 1)) for step in range(points)]
        return [(count, self.accuracy(count)) for count in counts]

    @property
    def sentence(self) -> str:
        """What is expected of twice as many images."""
        now, twice, low, high = (
            f"{100 * share:.0f}"
            for share in (self.accuracy(self.images), self.accuracy(2 * self.images), *self.interval)
        )
        return f"Twice as many photographs: {twice}% expected (95% interval {low}-{high}%), now {now}%."

    @property
    def how(self) -> str:
        """What was measured."""
        *fewer, most = self.curve.sizes
        draws = self.curve.judges.shape[0]
        return (
            f"The head was solved again on {', '.join(map(str, fewer))} and {most} training images, "
            f"{f'drawn {draws} times' if draws > 1 else 'drawn once'}, and judged by {self.judged}."
        )


def forecast(setup: Setup, feeds: dict[str, Feed], head: Row) -> Forecast | str:
    """The forecast for a head that was found; a sentence where there is none."""
    if setup.dataset.split("train").groups:
        return "There is no forecast for images in groups, since its subsets would divide them."
    train, val = (_features(feeds[name]) for name in ("train", "val"))
    classes = len(setup.parts.task.classes)
    width = train.take(0, [0]).numel()
    images = len(train.targets)
    work = classes * images * min(images, width)
    if work > WORK:
        return f"{images:,} training images of {classes:,} classes are too many to solve for again and again."
    views = min(train.views, WORK // work)
    tables = table_of(setup.parts, train, views), table_of(setup.parts, val)
    with threads_for(work * DRAWS):
        return forecast_of(*tables, head)


def forecast_of(train: Table, val: Table, head: Row) -> Forecast | str:
    """The forecast for the scaling and the strength of `head`; a sentence where there is none."""
    images, classes = len(train.labels), train.soft.shape[1]
    if images < FEWEST_PER_CLASS * classes:
        return f"{images} training images of {classes} classes are too few for a forecast."
    left_out = len(val.targets) < FEWEST_VAL
    curve = measured(train, val, head, left_out=left_out)
    if curve is None:
        return "The head does not converge on fewer training images, so there is no forecast."
    if len(curve.sizes) < FEWEST_SIZES:
        return f"{images} training images of {classes} classes are too few for a forecast."
    once = curve.judges.new_ones(1, 1)
    errors = curve.errors(once.expand(1, len(curve.judges)), once.expand(1, curve.judges.shape[1]))
    if not errors[0, -1]:
        return "Every image that the heads were judged by is classified correctly, so no improvement can be measured."
    judged = f"{len(val.targets):,} validation images"
    judged += " and a fifth of the training images, left out of each draw" if left_out else ""
    return Forecast(curve, fitted(curve.sizes, errors), images, _interval(curve, 2 * images), judged)


def measured(train: Table, val: Table, head: Row, *, left_out: bool) -> Curve | None:
    """The learning curve of a head's scaling and strength; None where one does not converge.

    The images of a draw are nested, so that two sizes differ by their number and less by luck; each class keeps its
    share. left_out: the last fifth of each draw is kept from its heads and judges them too. The strength is relative
    to the mean loss, so it grows as the images get fewer: what is assumed of the weights stays the same.
    """
    labels, (rows, width), classes = train.labels.cpu(), train.features.shape, train.soft.shape[1]
    images, draws = len(labels), min(DRAWS, max(1, WORK // (classes * rows * min(rows, width))))
    places = torch.stack([_places(labels, draw) for draw in range(draws)]).to(train.features.device)
    most = round((1 - LEFT_OUT) * images) if left_out else images
    sizes = [size for part in PARTS if (size := round(part * most)) >= classes]
    scaling = SCALINGS[head.scaling](train.features)
    axes, of_val, wrong = Axes.of(scaling(train.features)), scaling(val.features), []
    for size in sizes:
        shares = (places if size < images else places[:1]) < size
        problems = shares.to(train.soft)[:, train.images]
        [solution] = path(axes, train.soft, problems, [head.strength * images / size])
        if not solution.converged.all():
            return None
        heads = map(solution.head, range(len(problems)))
        said = torch.stack([(of_val @ weight.T + bias).argmax(dim=1) for weight, bias in heads])
        missed = [said != val.targets, solution.logits[:, :images].argmax(dim=2) != train.labels]
        wrong.append(torch.cat(missed[: 1 + left_out], dim=1).expand(draws, -1))
    judges = [torch.ones(draws, len(val.targets), dtype=torch.bool), places.cpu() >= most]
    return Curve(sizes, torch.stack(wrong).double().cpu(), torch.cat(judges[: 1 + left_out], dim=1).double())


def _places(labels: Tensor, seed: int) -> Tensor:
    """(N,) the place of each image in an order that is drawn, every beginning of which has each class in its share."""
    drawn = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = drawn[labels[drawn].sort(stable=True).indices]
    counts, label = torch.bincount(labels), labels[by_class]
    before = torch.arange(len(labels)) - (counts.cumsum(dim=0) - counts)[label]  # images of its class
    places = torch.empty_like(labels)
    places[by_class[(before / counts[label]).sort(stable=True).indices]] = torch.arange(len(labels))
    return places


def fitted(sizes: Sequence[int], errors: Tensor) -> PowerLaw:
    """The power laws with the least squared distance from errors (B, S), neither their scale nor their floor negative.

    For each exponent of a grid, scale and floor are a regression with one variable.
    """
    largest = max(sizes)
    shape = (torch.tensor(sizes, dtype=torch.float64) / largest) ** -EXPONENTS[:, None]  # (E, S), so that it is small
    around, mean = shape - shape.mean(dim=1, keepdim=True), errors.mean(dim=1, keepdim=True)
    scale = ((errors - mean) @ around.T / around.square().sum(dim=1)).clamp(min=0)  # (B, E)
    floor = mean - scale * shape.mean(dim=1)
    scale = torch.where(floor < 0, errors @ shape.T / shape.square().sum(dim=1), scale)
    floor = floor.clamp(min=0)
    rest = (scale[..., None] * shape + floor[..., None] - errors[:, None]).square().sum(dim=2)
    best = rest.argmin(dim=1, keepdim=True)
    exponent = EXPONENTS[best[:, 0]]
    return PowerLaw(scale.gather(1, best)[:, 0] * largest**exponent, exponent, floor.gather(1, best)[:, 0])


def _interval(curve: Curve, images: int) -> tuple[float, float]:
    """The 95% interval of the accuracy at so many images: draws and judging images are drawn again with replacement."""
    generator = torch.Generator().manual_seed(0)
    draws, images_ = (
        torch.stack([torch.bincount(row, minlength=number) for row in drawn]).double()
        for number in curve.judges.shape
        for drawn in [torch.randint(number, (RESAMPLED, number), generator=generator)]
    )
    accuracies = 1 - fitted(curve.sizes, curve.errors(draws, images_))(images)
    low, high = accuracies.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def _features(feed: Feed) -> Features:
    assert isinstance(feed.batches, FeatureBatches), "a head is found on cached features"
    return feed.batches.features
