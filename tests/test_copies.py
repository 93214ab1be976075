"""Copies by hash and features: what chance explains, against scipy; what is found; what needs the features."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import betabinom

from tl_trainer import copies as room
from tl_trainer.copies import FEWEST, POSSIBLE, SURE, Pair, bits_by_chance, copies, groups
from tl_trainer.data.pixels import BITS, mirrored

COUNT = 60


def drawn(count: int = COUNT, common: float = 0.0) -> np.ndarray:
    """Hashes of unrelated images; `common`: how much of each bit is that of one image."""
    rng = np.random.default_rng(0)
    return np.where(rng.random((count, BITS)) < 0.5 + common / 2, 1, -1)


def near(hash_: np.ndarray, bits: int) -> np.ndarray:
    """The hash with so many bits changed."""
    changed = hash_.copy()
    changed[:bits] *= -1
    return changed


def unrelated_features(count: int = COUNT) -> np.ndarray:
    return np.eye(count, dtype=np.float32)


@pytest.mark.parametrize("common", [0.0, 0.5])
@pytest.mark.parametrize("expected", [SURE, POSSIBLE, 50.0])
def test_chance_is_a_beta_binomial_with_the_moments_of_all_pairs(common: float, expected: float) -> None:
    hashes = drawn(200, common)
    # Bits in blocks of four that agree, so that they are correlated.
    hashes = np.repeat(hashes[:, : BITS // 4], 4, axis=1)
    pairs = np.triu_indices(len(hashes), 1)
    distances = ((BITS - hashes @ hashes.T) / 2)[pairs]
    share, alike = distances.mean() / BITS, 0.0
    alike = (distances.var() / (BITS * share * (1 - share)) - 1) / (BITS - 1)
    both = 1 / alike - 1
    chance = 2 * len(distances) * betabinom.cdf(np.arange(BITS), BITS, share * both, (1 - share) * both)
    assert bits_by_chance(hashes, expected) == int((chance <= expected).sum()) - 1


def test_images_that_are_composed_alike_leave_fewer_bits() -> None:
    limits = [bits_by_chance(drawn(COUNT, common), SURE) for common in (0.0, 0.6, 0.9)]
    assert limits[0] > limits[1] > limits[2] == -1
    assert bits_by_chance(np.ones((COUNT, BITS)), SURE) == -1
    two_pictures = np.outer(np.arange(COUNT) % 2 * 2 - 1, np.ones(BITS))
    assert bits_by_chance(two_pictures, SURE) == -1


def test_many_copies_do_not_hide_each_other() -> None:
    hashes = drawn(FEWEST)
    before = bits_by_chance(hashes, SURE)
    hashes[10:20] = hashes[:10]
    assert bits_by_chance(hashes, SURE) == before


def test_more_images_leave_fewer_bits() -> None:
    assert bits_by_chance(drawn(2), SURE) > bits_by_chance(drawn(FEWEST - 1), SURE) > bits_by_chance(drawn(2000), SURE)


@pytest.mark.parametrize("cells", [7 * COUNT, 2**24])
def test_copies_are_found_and_nothing_else(cells: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "_CELLS", cells)
    hashes = drawn()
    hashes[11], hashes[40] = near(hashes[3], 2), near(mirrored(hashes[20:21])[0], 1)
    assert bits_by_chance(hashes, SURE) >= 2
    found = sorted(copies(hashes, unrelated_features()))
    assert found == [Pair(3, 11, 2, False), Pair(20, 40, 1, True)]


def test_where_chance_may_be_the_reason_the_features_decide() -> None:
    hashes, features = drawn(), unrelated_features()
    bits = bits_by_chance(hashes, POSSIBLE)
    assert bits > bits_by_chance(hashes, SURE)
    hashes[11] = near(hashes[3], bits)
    assert not copies(hashes, features)
    features[11] = 0.9 * features[3] + 0.19**0.5 * features[11]
    assert copies(hashes, features) == [Pair(3, 11, bits, False)]
    features[12] = features[11]  # a third image that is as near
    assert not copies(hashes, features)
    hashes[12] = hashes[11]  # unless that is a copy too
    assert Pair(3, 11, bits, False) in copies(hashes, features)


def test_two_images() -> None:
    hashes = drawn(2)
    assert copies(hashes, unrelated_features(2)) == []
    hashes[1] = hashes[0]
    assert copies(hashes, unrelated_features(2)) == [Pair(0, 1, 0, False)]


def test_an_image_and_its_copies_are_one_group() -> None:
    pairs = [Pair(0, 3, 0, False), Pair(3, 4, 2, True)]
    number = groups(pairs, 6).tolist()
    assert number[0] == number[3] == number[4]
    assert len({number[0], number[1], number[2], number[5]}) == 4
    assert len({*groups([], 3).tolist()}) == 3
