"""The evaluation pass: scores of all batches, whatever their sizes, with nothing kept for a gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tl_trainer.data.loaders import Batch
from tl_trainer.evaluate import evaluate
from tl_trainer.metrics import averaged


@pytest.mark.parametrize("sizes", [[17], [5, 5, 5, 2], [16, 1]])
def test_scores_are_of_all_images_of_all_batches(sizes: list[int]) -> None:
    torch.manual_seed(0)
    network, inputs, targets = nn.Linear(4, 7), torch.randn(17, 4), torch.randint(0, 7, (17,))
    parts = zip(inputs.split(sizes), targets.split(sizes), torch.arange(17).split(sizes), strict=True)
    found = evaluate(network, [Batch(*part) for part in parts])
    torch.testing.assert_close(found.logits, network(inputs).detach())
    assert torch.equal(found.targets, targets)


def test_each_batch_leaves_the_device_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    cpu = Tensor.cpu
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: (moved.append(len(tensor)), cpu(tensor))[1])
    batches = [
        Batch(torch.randn(count, 4), torch.zeros(count, dtype=torch.int64), torch.arange(count)) for count in (5, 2)
    ]
    evaluate(nn.Identity(), batches)
    assert moved == [5, 5, 2, 2]


def test_logits_of_lower_precision_become_float32() -> None:
    batch = Batch(torch.randn(3, 4).bfloat16(), torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert evaluate(nn.Identity(), [batch]).logits.dtype == torch.float32


def test_nothing_is_kept_for_a_gradient() -> None:
    network, seen = nn.Linear(4, 7), []

    def forward(inputs: Tensor) -> Tensor:
        seen.append(network(inputs))
        return seen[-1]

    evaluate(forward, [Batch(torch.randn(2, 4), torch.tensor([0, 1]), torch.arange(2))])
    assert seen[0].is_inference()


def test_what_is_to_happen_after_each_batch_happens_outside_of_inference_mode() -> None:
    modes: list[bool] = []
    batch = Batch(torch.randn(2, 7), torch.tensor([0, 1]), torch.arange(2))
    evaluate(nn.Identity(), [batch, batch], lambda: modes.append(torch.is_inference_mode_enabled()))
    assert modes == [False, False]


def test_a_split_without_images_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="no batch"):
        evaluate(nn.Identity(), [])


def test_one_view_is_left_as_it_is() -> None:
    logits = torch.randn(5, 3)
    assert averaged([logits]) is logits


def test_views_are_averaged_as_probabilities() -> None:
    views = [3 * torch.randn(6, 4) for _ in range(5)]
    expected = torch.stack([view.softmax(dim=1) for view in views]).mean(dim=0)
    torch.testing.assert_close(averaged(views).softmax(dim=1), expected)


class WithoutFloat64(TorchFunctionMode):
    """Stands for an Apple GPU: float64 is for what was brought to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func is not Tensor.double or getattr(args[0], "brought", False)
        found = func(*args, **(kwargs or {}))
        if func is Tensor.cpu:
            found = found.clone()
            found.brought = True
        return found


def test_views_are_averaged_on_the_cpu() -> None:
    views = [torch.randn(6, 4) for _ in range(2)]
    with WithoutFloat64():
        found = averaged(views)
    assert torch.equal(found, averaged(views))
