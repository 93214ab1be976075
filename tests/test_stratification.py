"""Iterative stratification: every part has its share of each label, and divides no group."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_trainer.stratification import stratified, with_copies


def labels(images: int, shares: list[float], seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((images, len(shares))) < shares).astype(int)


def test_each_fold_has_its_share_of_each_label() -> None:
    targets = labels(500, [0.5, 0.1, 0.03])
    fold = np.array(stratified(targets, [0.2] * 5, 0))
    for number in range(5):
        np.testing.assert_allclose(targets[fold == number].sum(axis=0), targets.sum(axis=0) / 5, atol=1.5)
        assert abs((fold == number).sum() - 100) <= 3
    assert list(fold) == stratified(targets, [0.2] * 5, 0)
    assert list(fold) != stratified(targets, [0.2] * 5, 1)


def test_a_rare_label_is_as_even_as_it_can_be_and_a_single_one_is_in_the_larger_part() -> None:
    targets = np.zeros((40, 2), int)
    targets[:5, 0], targets[7, 1] = 1, 1
    part = np.array(stratified(targets, [0.2, 0.8], 3))
    assert (part == 0).sum() == 8
    assert targets[part == 0].sum(axis=0).tolist() == [1, 0]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 100), st.integers(2, 12))
def test_no_group_is_divided(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.integers(0, count, 60).tolist()
    part = stratified(labels(60, [0.4, 0.2, 0.0], seed), [0.3, 0.7], seed, groups)
    assert len({*zip(groups, part, strict=True)}) == len({*groups})


def test_groups_that_share_an_image_are_one() -> None:
    assert with_copies(["a", "b", "c"], [b"1", b"1", b"2"]) == ["a", "a", "c"]
