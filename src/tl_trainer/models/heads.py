"""The new classifier on top of the features: one Linear, or an MLP."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def build_head(in_features: int, hidden: Sequence[int], classes: int, dropout: float) -> nn.Sequential:
    """(N, in_features) -> (N, classes): hidden [256, 256] is Linear-ReLU-Linear-ReLU-Linear, dropout before each Linear."""
    layers: list[nn.Module] = []
    widths = [in_features, *hidden, classes]
    for index, (wide, narrow) in enumerate(zip(widths, widths[1:], strict=False)):
        if index:
            layers.append(nn.ReLU(inplace=True))
        if dropout:
            layers.append(nn.Dropout(dropout))
        layers.append(nn.Linear(wide, narrow))
    return nn.Sequential(*layers)
