"""The evaluation pass: figures over all batches, whatever their sizes, with nothing kept for a gradient."""

from __future__ import annotations

from dataclasses import astuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from tl_trainer.data.loaders import Batch
from tl_trainer.evaluate import evaluate


@pytest.mark.parametrize("sizes", [[17], [5, 5, 5, 2], [16, 1]])
def test_figures_are_over_all_images_of_all_batches(sizes: list[int]) -> None:
    torch.manual_seed(0)
    network, inputs, targets = nn.Linear(4, 7), torch.randn(17, 4), torch.randint(0, 7, (17,))
    parts = zip(inputs.split(sizes), targets.split(sizes), torch.arange(17).split(sizes), strict=True)
    found = evaluate(network, [Batch(*part) for part in parts])
    logits = network(inputs).detach()
    right = logits.topk(5).indices == targets.unsqueeze(1)
    expected = [functional.cross_entropy(logits, targets), right[:, 0].float().mean(), right.any(1).float().mean(), 17]
    assert astuple(found) == pytest.approx([float(value) for value in expected])


def test_nothing_is_kept_for_a_gradient() -> None:
    network, seen = nn.Linear(4, 7), []

    def forward(inputs: Tensor) -> Tensor:
        seen.append(network(inputs))
        return seen[-1]

    evaluate(forward, [Batch(torch.randn(2, 4), torch.tensor([0, 1]), torch.arange(2))])
    assert seen[0].is_inference()


def test_a_split_without_images_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no batch"):
        evaluate(nn.Identity(), [])
