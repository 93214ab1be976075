"""BatchNorm over all ranks: for one rank it is torch's own. Several ranks are for ground/test_distributed.py."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tl_trainer.models.synced import synchronised


@pytest.mark.parametrize(
    ("norm", "shape"),
    [(nn.BatchNorm1d(4), (6, 4)), (nn.BatchNorm1d(4), (6, 4, 5)), (nn.BatchNorm2d(4, momentum=None), (6, 4, 5, 3)),
     (nn.BatchNorm2d(4, affine=False, track_running_stats=False), (3, 4, 2, 2))],
)  # fmt: skip
def test_it_is_torchs_own_with_one_rank(norm: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    images = torch.randn(shape, requires_grad=True)
    weights = torch.randn(shape)
    own = copy.deepcopy(norm)
    for _ in range(2):
        expected = own(images)
        with synchronised(norm):
            found = norm(images)
        torch.testing.assert_close(found, expected)
        theirs, ours = (torch.autograd.grad((output * weights).sum(), images)[0] for output in (expected, found))
        torch.testing.assert_close(ours, theirs)
    assert norm.state_dict().keys() == own.state_dict().keys()
    for name, value in own.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value)
    assert "forward" not in vars(norm)
