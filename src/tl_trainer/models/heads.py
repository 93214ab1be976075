"""The new classifier on top of the features: one Linear, or an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn


def build_head(in_features: int, hidden: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    """(N, in_features) -> (N, classes): hidden [256, 256] is three Linear with ReLU between, dropout before each."""
    layers: list[nn.Module] = []
    widths = [in_features, *hidden, classes]
    for index, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        if index:
            layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(wide, narrow))
    return nn.Sequential(*layers)
