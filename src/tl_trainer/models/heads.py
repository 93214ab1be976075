"""The new classifier on top of the features: one Linear, or an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from tl_trainer.checkpoint import Checkpoint
from tl_trainer.config.schema import HeadSection
from tl_trainer.errors import CheckpointError
from tl_trainer.ground.wording import listed


class UnitLinear(nn.Linear):
    """A Linear whose inputs are scaled to length 1."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(functional.normalize(input))


def build_head(
    in_features: int, hidden: Sequence[int], classes: int, dropout: float, *, unit: bool = False
) -> nn.Sequential:
    """(N, in_features) -> (N, classes): hidden [256, 256] is three Linear with ReLU between, dropout before each.

    unit: whether the features are scaled to length 1 first.
    """
    layers: list[nn.Module] = []
    widths = [in_features, *hidden, classes]
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        if index:
            layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append((UnitLinear if unit and not index else nn.Linear)(wide, narrow))
    return nn.Sequential(*layers)


def new_head(features: int, classes: int, section: HeadSection) -> nn.Sequential:
    """The head that the section describes."""
    return build_head(features, section.hidden, classes, section.dropout, unit=section.normalise == "l2")


def take_head(head: nn.Module, classes: Sequence[str], saved: Checkpoint) -> str:
    """Give a new head what it can take of that of a checkpoint; what was taken, in words.

    The rows of the last Linear are taken by the names of their classes. Raises CheckpointError where the head in the
    checkpoint is not the one of its configuration.
    """
    try:
        section = HeadSection.model_validate(saved.config["model"]["head"])
        with torch.device("meta"):
            other = new_head(saved.features, len(saved.classes), section)
        state = {k.removeprefix("head."): v for k, v in saved.trained.items() if k.startswith("head.")}
        other.load_state_dict(state, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError("the head in the checkpoint of model.weights does not fit its configuration") from error
    own, others = ([layer for layer in of.children() if isinstance(layer, nn.Linear)] for of in (head, other))
    if own[0].in_features != others[0].in_features:
        return f", and not its head, which takes {others[0].in_features} features and not {own[0].in_features}"
    if [(type(layer), layer.in_features) for layer in own] != [(type(layer), layer.in_features) for layer in others]:
        normalise = "l2" if section.normalise == "l2" else "none"
        wanted = f"model.head.hidden: {section.hidden} and model.head.normalise: {normalise}"
        return f", and not its head; to take it too, set {wanted}"
    rows = {row: saved.classes.index(name) for row, name in enumerate(classes) if name in saved.classes}
    if not rows:
        return ", and not its head, which has none of these classes"
    with torch.no_grad():
        for layer, taken in zip(own[:-1], others[:-1], strict=True):
            layer.load_state_dict(taken.state_dict())
        for row, of_other in rows.items():
            own[-1].weight[row], own[-1].bias[row] = others[-1].weight[of_other], others[-1].bias[of_other]
    new = [name for row, name in enumerate(classes) if row not in rows]
    return f", and of its head {len(rows)} of {len(classes)} classes; new: {listed(new)}" if new else ", and its head"
