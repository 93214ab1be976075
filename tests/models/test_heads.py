"""Heads: the layers of each layout, their sizes, and what they compute."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tl_trainer.models.heads import build_head


def layout(head: nn.Sequential) -> list[str | tuple[int, int]]:
    """Linear layers as (in, out), the others by name."""
    return [
        (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else type(layer).__name__
        for layer in head
    ]


def test_one_linear() -> None:
    assert layout(build_head(2048, [], 102, 0.0)) == [(2048, 102)]


def test_hidden_layers_have_relu_between() -> None:
    head = build_head(1280, [256, 256], 100, 0.0)
    assert layout(head) == [(1280, 256), "ReLU", (256, 256), "ReLU", (256, 100)]


def test_dropout_is_before_each_linear() -> None:
    head = build_head(8, [6, 4], 3, 0.25)
    assert layout(head) == ["Dropout", (8, 6), "ReLU", "Dropout", (6, 4), "ReLU", "Dropout", (4, 3)]
    assert {layer.p for layer in head if isinstance(layer, nn.Dropout)} == {0.25}


@pytest.mark.parametrize("hidden", [[], [5], [5, 7, 9]])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_features_to_logits_without_changing_the_features(hidden: list[int], dropout: float) -> None:
    features = torch.randn(4, 6)
    before = features.clone()
    assert build_head(6, hidden, 3, dropout)(features).shape == (4, 3)
    assert torch.equal(features, before)  # cached features are used again in the next epoch


def test_a_hidden_layer_is_what_its_formula_says() -> None:
    head = build_head(6, [5], 3, 0.0)
    first, _, last = head
    features = torch.randn(4, 6)
    expected = (features @ first.weight.T + first.bias).clamp(min=0) @ last.weight.T + last.bias
    torch.testing.assert_close(head(features), expected)
