"""The new classifier on top of the features: one Linear, or an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional


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
