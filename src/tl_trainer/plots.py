"""The pictures of an evaluation, for the report and for TensorBoard: confusion matrix and reliability diagram."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tl_trainer.ground.wording import printable
from tl_trainer.metrics import BINS, Confusion, Reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

NUMBERED = 20  # classes up to which every cell shows its count
WHOLE = 200  # classes up to which all are shown, and above which only the worst
WORST = 50
LONGEST_NAME = 24
ACROSS = 24  # letters of all names together that fit below the columns


def confusion_figure(confusion: Confusion, classes: Sequence[str]) -> Figure:
    """Counts with a row per label and a column per predicted class, coloured by their share of the label's images.

    Of more than WHOLE classes it shows the WORST that most mistakes are about.
    """
    import numpy as np
    import torch

    shown = confusion.worst(len(classes) if len(classes) <= WHOLE else WORST)
    images = torch.zeros(len(classes), dtype=torch.int64).index_add_(0, confusion.labels, confusion.counts)
    share = confusion.among(shown).numpy() / np.maximum(images[shown, None].numpy(), 1)
    figure = _matrix(confusion.among(shown), share, [classes[index] for index in shown.tolist()])
    figure.axes[0].set(xlabel="predicted", ylabel="label")
    if len(shown) < len(classes):
        figure.axes[0].set_title(f"the {len(shown)} of {len(classes):,} classes with the most mistakes")
    return figure


def co_occurrence_figure(counts: Tensor, classes: Sequence[str]) -> Figure:
    """How many images have both labels, (L, L), coloured by their share of the images with the row's label.

    Of more than WHOLE labels it shows the WORST that most images have.
    """
    import numpy as np

    images = counts.diagonal()
    most = WHOLE if len(classes) <= WHOLE else WORST
    shown = images.sort(descending=True, stable=True).indices[:most].sort().values
    among = counts[shown][:, shown]
    share = among.numpy() / np.maximum(images[shown, None].numpy(), 1)
    figure = _matrix(among, share, [classes[index] for index in shown.tolist()])
    figure.axes[0].set(xlabel="has this label too", ylabel="label")
    if len(shown) < len(classes):
        figure.axes[0].set_title(f"the {len(shown)} of {len(classes):,} labels that most images have")
    return figure


def _matrix(cells: Tensor, share: Any, classes: Sequence[str]) -> Figure:
    """A cell for each pair of classes, coloured by its share of the row, (N, N)."""
    import numpy as np
    from matplotlib.figure import Figure

    counts, number = cells.numpy(), len(classes)
    side = max(3.2, min(0.55 * number, 7) if number <= NUMBERED else min(0.155 * number, 30))
    figure = Figure(figsize=(side + 2.2, side + 1.6), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    names = [_short(name) for name in classes]
    size = 9 if number <= NUMBERED else 6.5
    upright = sum(map(len, names)) > ACROSS
    axes.set_xticks(range(number), names, rotation=90 if upright else 0, fontsize=size, parse_math=False)
    axes.set_yticks(range(number), names, fontsize=size, parse_math=False)
    if number <= NUMBERED:
        for row, column in np.ndindex(counts.shape):
            colour = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour, fontsize=9)
    figure.colorbar(image, ax=axes, shrink=0.6, label="share of the label's images")
    return figure


def reliability_figure(curves: dict[str, Reliability]) -> Figure:
    """Accuracy against confidence for each of the named curves, and how many images are in each bin of the last."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    upper.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle="--", label="confidence = accuracy")
    for name, curve in curves.items():
        filled = curve.images > 0
        confidence, accuracy = curve.confidence[filled].numpy(), curve.accuracy[filled].numpy()
        (line,) = upper.plot(confidence, accuracy, linewidth=1, label=name)
        share = (curve.images / curve.images.max())[filled].numpy()  # a dot's area says how much it is worth
        upper.scatter(confidence, accuracy, s=4 + 46 * share, color=line.get_color(), clip_on=False)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    upper.legend(loc="lower right", fontsize=8)
    *_, last = curves.values()
    lower.bar((np.arange(BINS) + 0.5) / BINS, last.images.numpy(), width=0.9 / BINS, color="tab:grey")
    lower.set(xlabel="confidence (probability of the predicted class)", ylabel=f"images\n({name})")
    return figure


def strengths_figure(curves: dict[str, list[tuple[float, float, float]]], measure: str = "top-1") -> Figure:
    """Log loss and a measure against the strength of L2: (strength, log loss, share) of each scaling of features."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, points in curves.items():
        strengths, losses, shares = zip(*points, strict=True)
        left.plot(strengths, losses, linewidth=1.2, label=name)
        right.plot(strengths, [100 * share for share in shares], linewidth=1.2)
    left.set(xscale="log", xlabel="strength of L2", ylabel="log loss")
    right.set(xscale="log", xlabel="strength of L2", ylabel=f"{measure} in %")
    left.legend(fontsize=8, title="features", title_fontsize=8)
    return figure


def epochs_figure(
    epochs: Sequence[dict[str, float]], best: int | None, shown: tuple[str, str] = ("top1", "top-1")
) -> Figure:
    """Loss and a figure against the epoch, with the best one marked, if any. epochs: the rows of metrics.csv.

    shown: the figure's key, and its name.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.6, 3.4), layout="constrained")
    numbers = [row["epoch"] for row in epochs]
    left, right = figure.subplots(1, 2)
    for name in ("train", "val"):
        left.plot(numbers, [row[f"{name}_loss"] for row in epochs], ".-", linewidth=1.2, markersize=4, label=name)
    shares = [100 * row[f"val_{shown[0]}"] for row in epochs]
    right.plot(numbers, shares, ".-", linewidth=1.2, markersize=4, color="tab:orange", label="val")
    for axes, name in ((left, "loss"), (right, f"{shown[1]} in %")):
        if best is not None:
            axes.axvline(best, color="grey", linestyle="--", linewidth=1, label=f"best epoch: {best}")
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(fontsize=8)
    return figure


def rates_figure(points: Sequence[tuple[float, float, float]], suggested: float | None) -> Figure:
    """Loss against the learning rate, and its running mean. points: (rate, loss, mean loss), by rising rates."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.4), layout="constrained")
    axes = figure.subplots()
    rates, losses, means = zip(*points, strict=True)
    axes.semilogx(rates, losses, ".", markersize=4, color="lightgrey", label="a batch")
    axes.semilogx(rates, means, "-", linewidth=1.2, label="running mean")
    if suggested is not None:
        axes.axvline(suggested, color="grey", linestyle="--", linewidth=1, label=f"suggested: {suggested:g}")
    axes.set(xlabel="learning rate", ylabel="loss", ylim=(0.9 * min(losses), 1.1 * max(means)))
    axes.legend(fontsize=8)
    return figure


def forecast_figure(
    measured: dict[int, list[float]], law: Sequence[tuple[float, float]], interval: tuple[float, float]
) -> Figure:
    """Accuracy against the number of training images: a dot for each head, the law, the interval at the law's end.

    measured: the accuracies of the heads trained on so many images. law: (images, accuracy), ascending.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.4), layout="constrained")
    axes = figure.add_subplot()
    images, accuracies = zip(*law, strict=True)
    axes.plot(images, [100 * share for share in accuracies], linewidth=1.2, color="tab:blue", label="power law")
    dots = [(count, 100 * share) for count, shares in measured.items() for share in shares]
    axes.plot(*zip(*dots, strict=True), ".", markersize=4, color="black", label="measured")
    low, high = (100 * share for share in interval)
    axes.plot([images[-1]] * 2, [low, high], linewidth=5, alpha=0.4, color="tab:blue", label="95% interval")
    ticks = [*measured, images[-1]]
    axes.set(xscale="log", xlabel="training images", ylabel="top-1 in %", ylim=(None, 100.5))
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right", fontsize=8)
    return figure


def png(figure: Figure, dpi: int = 110) -> bytes:
    """The figure as a PNG file. A character that no font has is drawn as a box, without a warning for each."""
    import warnings

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def _short(name: str) -> str:
    name = printable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[:15]}…{name[-8:]}"  # the end often tells them apart
