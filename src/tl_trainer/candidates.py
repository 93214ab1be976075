"""The heads that a search compared, and the one it took: as data, as lines and as CSV."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from tl_trainer.ground.files import csv_text

Layers = list[tuple[Tensor, Tensor]]  # of each Linear the weight (out, in) and the bias (out,)

LINEAR = "logistic regression"
MEANS, NEIGHBOURS, RIDGE = "nearest class mean", "nearest neighbours", "ridge regression"
UNIT = "length 1"  # the scaling for which the head is a `UnitLinear`
# What to try where such a method beats the head that was taken.
REMEDIES = {
    LINEAR: "leave out model.head.hidden",
    MEANS: "look for wrong labels among the surest mistakes in the report, and try train.loss.label_smoothing=0.1",
    NEIGHBOURS: "try model.head.hidden=[256]",
    RIDGE: "try train.loss.label_smoothing=0.1",
}


@dataclass(frozen=True)
class Row:
    """A candidate: its settings, and how good it is on the images that judge.

    strength: of L2, the weight decay of an MLP, or the number of neighbours. loss: the log loss in nats; None for a
    method that gives no probabilities. note: why it may not be taken, if so. rate, dropout, epochs: of an MLP.
    """

    method: str
    scaling: str
    strength: float
    loss: float | None
    top1: float
    note: str = ""
    rate: float | None = None
    dropout: float | None = None
    epochs: int | None = None

    @property
    def settings(self) -> str:
        """The settings in words."""
        if self.rate is not None:
            return f"lr {self.rate:g} decay {self.strength:g} dropout {self.dropout:g}"
        words = {MEANS: "", NEIGHBOURS: f", k {self.strength:.0f}"}
        return self.scaling + words.get(self.method, f", L2 {self.strength:.2g}")


@dataclass(frozen=True)
class Found:
    """All candidates, the one that was taken, and its layers.

    judged: by which images, in words, and `images` how many. folds: how many of cross-validation judged too, or 0.
    held_out: where the head was solved again on train and val, the logits of the val images by heads that did not see
    them (M, C). several: whether images may have several labels; then `top1` is the mean average precision. alike: of
    several heads, which agree on whether features have length 1, so that only those like the best were to be had.
    """

    rows: list[Row]
    best: Row
    layers: Layers
    judged: str
    images: int
    folds: int = 0
    held_out: Tensor | None = None
    several: bool = False
    alike: bool = False

    @property
    def parts(self) -> dict[str, Found]:
        """Itself, as `FoundHeads` has one for each head."""
        return {"": self}

    @property
    def key(self) -> str:
        """What the figure of a candidate is called in files."""
        return "map" if self.several else "top1"

    @property
    def measure(self) -> str:
        """What it is called in words."""
        return "mAP" if self.several else "top-1"

    @property
    def unit(self) -> bool:
        """Whether the head takes features of length 1."""
        return self.best.scaling == UNIT

    @property
    def figure(self) -> str:
        """What the top-1 of the table is measured on."""
        return "val + folds" if self.folds else "val"

    def summary(self) -> dict[str, Any]:
        """What result.json says of the search."""
        row = {key: value for key, value in asdict(self.best).items() if value is not None and key != "note"}
        row = {self.key if key == "top1" else key: value for key, value in row.items()}
        settings = {"settings": self.best.settings, "candidates": len(self.rows), "judged_by": self.judged}
        return {**row, **settings, "refit": self.held_out is not None}

    def curves(self) -> dict[str, list[tuple[float, float, float]]]:
        """(strength, log loss, top-1) of the linear candidates, by how their features are scaled."""
        found: dict[str, list[tuple[float, float, float]]] = {}
        for row in self.rows:
            if row.loss is not None and row.method == LINEAR and not row.note:
                found.setdefault(row.scaling, []).append((row.strength, row.loss, row.top1))
        return found

    def shown(self, count: int = 8) -> list[Row]:
        """The one taken, those of its method with the lowest log loss, and the best of each other method by top-1."""
        sound = [row for row in self.rows if not row.note and not (self.alike and (row.scaling == UNIT) != self.unit)]
        sound.sort(key=lambda row: row.loss or 0.0)
        others: dict[str, Row] = {}
        for row in sound:
            if row.method != self.best.method and (row.method not in others or row.top1 > others[row.method].top1):
                others[row.method] = row
        alike = [row for row in sound if row.method == self.best.method and row is not self.best]
        return [self.best, *alike[: count - 1 - len(others)], *others.values()]

    def sessions(self) -> Iterator[tuple[dict[str, str | float], dict[str, float]]]:
        """The candidates worth seeing, each as settings and figures."""
        for row in self.shown():
            settings: dict[str, str | float] = {
                "search/method": row.method,
                "search/features": row.scaling,
                "search/strength": row.strength,
            }
            figures = {f"search/{self.key}": row.top1, "search/loss": row.loss}
            yield settings, {tag: value for tag, value in figures.items() if value is not None}

    def lines(self) -> list[str]:
        """The candidates worth seeing, as lines of a table."""
        rows = self.shown()
        width = max(len(row.settings) for row in rows)
        lines = [f"  {'head':19}  {'settings':{width}}  log loss  {self.measure} ({self.figure})"]
        for row in rows:
            mark, loss = ">" if row is self.best else " ", "" if row.loss is None else f"{row.loss:.4f}"
            lines.append(f"{mark} {row.method:19}  {row.settings:{width}}  {loss:>8}  {row.top1:.1%}")
        return lines

    def remark(self) -> str | None:
        """Which simpler method is better than the head by more than a standard error of its top-1, and the remedy."""
        if self.several:  # the standard error of a mean average precision is not known
            return None
        error = (self.best.top1 * (1 - self.best.top1) / self.images) ** 0.5
        others = [row for row in self.shown() if row.method in REMEDIES and row.method != self.best.method]
        ahead = max(others, key=lambda row: row.top1, default=self.best)
        if ahead.top1 - self.best.top1 <= error:
            return None
        return (
            f"{ahead.method} ({ahead.settings}) does better: top-1 {ahead.top1:.1%} against {self.best.top1:.1%}, by "
            f"more than a standard error ({error:.1%}); {REMEDIES[ahead.method]}"
        )

    def table(self) -> str:
        """All candidates as CSV."""
        header = (self.key if field.name == "top1" else field.name for field in fields(Row))
        return csv_text(header, map(astuple, self.rows))


@dataclass(frozen=True)
class FoundHeads:
    """What was found for each of several heads, by its name, in the order of their classes.

    They are one layer, so all take features of length 1 or none does. held_out: as of `Found`, of all classes; not a
    number where an image has no label of a head.
    """

    parts: dict[str, Found]
    held_out: Tensor | None = None

    @property
    def unit(self) -> bool:
        """As of `Found`."""
        return all(found.unit for found in self.parts.values())

    @property
    def layers(self) -> Layers:
        """The one Linear of all heads."""
        weights, biases = zip(*(layer for found in self.parts.values() for layer in found.layers), strict=True)
        return [(torch.cat(weights), torch.cat(biases))]

    def summary(self) -> dict[str, Any]:
        """What result.json says of the search: of each head what it says of one."""
        heads = {name: found.summary() for name, found in self.parts.items()}
        return {"heads": heads, "refit": self.held_out is not None}

    def table(self) -> str:
        """All candidates as CSV; measure: what the figure is."""
        header = ("figure" if field.name == "top1" else field.name for field in fields(Row))
        parts = self.parts.items()
        rows = ((name, found.key, *astuple(row)) for name, found in parts for row in found.rows)
        return csv_text(("head", "measure", *header), rows)
