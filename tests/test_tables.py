"""Scalings of features, and folds of their rows."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from sklearn.preprocessing import Normalizer, StandardScaler
from torch import Tensor, nn

from tl_trainer.tables import FOLDS, SCALINGS, Table, folds_in, scalings_for, shares_of

FEATURES = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7) + 3


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("standardised", torch.from_numpy(StandardScaler().fit_transform(FEATURES.numpy()))),
        ("raw", FEATURES),
        ("length 1", torch.from_numpy(Normalizer().fit_transform(FEATURES.numpy()))),
    ],
)
def test_a_scaling_is_scikit_learns_and_folds_into_the_head(name: str, expected: Tensor) -> None:
    scaling, layer = SCALINGS[name](FEATURES), nn.Linear(6, 2)
    assert torch.allclose(scaling(FEATURES), expected, atol=1e-5)
    [(weight, bias)] = scaling.folded([(layer.weight, layer.bias)])
    seen = nn.functional.normalize(FEATURES) if scaling.unit else FEATURES
    assert torch.allclose(seen @ weight.T + bias, layer(expected), atol=1e-4)


@pytest.mark.parametrize(
    ("normalise", "names"), [("auto", [*SCALINGS]), ("l2", ["length 1"]), ("none", ["standardised", "raw"])]
)
def test_the_configuration_says_which_are_allowed(normalise: Literal["auto", "none", "l2"], names: list[str]) -> None:
    assert scalings_for(normalise) == names


def test_each_fold_is_left_out_of_one_problem_and_none_of_the_last() -> None:
    targets = torch.arange(40) % 4
    table = Table(FEATURES, targets, nn.functional.one_hot(targets).float(), torch.arange(20).repeat(2))
    fold = folds_in(table)
    assert torch.equal(fold[:20], fold[20:])
    assert torch.equal(table.part(fold == 1).images.unique(), table.images[fold == 1].unique())
    shares = shares_of(fold, table.features)
    assert shares.shape == (FOLDS + 1, 40)
    for number in range(FOLDS):
        assert torch.equal(shares[number] == 0, fold == number)
    assert shares[-1].all()
    assert torch.equal(shares_of(torch.full_like(fold, FOLDS), table.features), torch.ones(1, 40))
