"""Copies among images: the same picture at another size, in another quality, or mirrored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import betaln

from tl_trainer.data.pixels import BITS, mirrored

# Pairs of unrelated images that are expected by chance, up to which the hash alone decides, and then the features.
SURE, POSSIBLE = 1e-6, 1.0
RATIO = 0.8  # of the distances to the match and to the next image (Lowe, 2004)
FEWEST = 30  # images from which their own distances say what chance is
ALIKE = 0.003  # the least correlation of two bits: that of snapshots, which have little in common
CLIPPED = 4  # deviations from the mean, beyond which a pair is not counted as unrelated
_SAMPLED = 1000  # images, whose pairs are enough to say what chance is
_CELLS = 2**24  # pairs whose distances are in memory at once


class Pair(NamedTuple):
    """Two images, first < second, of which one is a copy of the other, and in how many bits their hashes differ."""

    first: int
    second: int
    bits: int
    mirrored: bool


def copies(hashes: np.ndarray, features: np.ndarray) -> list[Pair]:
    """The pairs among hashes (N, BITS) of 1 and -1 and features of length 1 (N, D). Time grows with N squared.

    The hash alone decides where chance is no explanation. Where it explains less than one pair, the features have to
    confirm it: the two must be clearly nearer to each other than to any third image that is no copy.
    """
    limit, loose = (bits_by_chance(hashes, expected) for expected in (SURE, POSSIBLE))
    found, hashes, flipped = [], hashes.astype(np.float32), mirrored(hashes).astype(np.float32)
    step = max(1, _CELLS // len(hashes))
    for start in range(0, len(hashes), step):
        rows = slice(start, start + step)
        straight, turned = ((BITS - hashes[rows] @ others.T) / 2 for others in (hashes, flipped))
        bits = np.minimum(straight, turned)
        later = np.arange(len(hashes)) > np.arange(start, start + len(bits))[:, None]
        for row, second in zip(*np.nonzero((bits <= loose) & later), strict=True):
            flip = bool(turned[row, second] < straight[row, second])
            found.append(Pair(start + int(row), int(second), int(bits[row, second]), flip))
    sure = [pair for pair in found if pair.bits <= limit]
    return [*sure, *_confirmed([pair for pair in found if pair.bits > limit], sure, features)]


def bits_by_chance(hashes: np.ndarray, expected: float) -> int:
    """The most differing bits within which at most `expected` pairs of unrelated images lie; -1: already at none.

    The distances of unrelated pairs are taken to be beta-binomial with the mean and the variance of all pairs, copies
    aside: the more alike the images are composed, the fewer bits are left that tell them apart.
    """
    count, share, alike = len(hashes), 0.5, ALIKE
    if count >= FEWEST:
        some = hashes[:: -(-count // _SAMPLED)].astype(np.float32)
        distances = ((BITS - some @ some.T) / 2)[np.triu_indices(len(some), 1)].astype(np.float64)
        distances = distances[np.abs(distances - distances.mean()) <= CLIPPED * distances.std()]
        share = distances.mean() / BITS
        alone = BITS * share * (1 - share)  # the variance of bits that are independent
        if alone == 0:
            return -1
        alike = max(ALIKE, (distances.var() / alone - 1) / (BITS - 1))
        if alike >= 1:
            return -1
    both, bits = 1 / alike - 1, np.arange(BITS + 1)
    ways = -np.log(BITS + 1) - betaln(BITS - bits + 1, bits + 1)
    first, second = share * both, (1 - share) * both
    within = np.exp(ways + betaln(bits + first, BITS - bits + second) - betaln(first, second)).cumsum()
    pairs = count * (count - 1)  # each twice: straight and mirrored
    return int(np.searchsorted(pairs * within, expected, side="right")) - 1


def _confirmed(pairs: list[Pair], sure: list[Pair], features: np.ndarray) -> Iterator[Pair]:
    """Those of the pairs whose features are clearly nearer to each other than to those of a third image."""
    same = groups(sure, len(features))
    for pair in pairs:
        ends = features[[pair.first, pair.second]]
        distances = np.sqrt(np.maximum(2 - 2 * ends @ features.T, 0))
        third = ~np.isin(same, same[[pair.first, pair.second]])
        if not third.any() or distances[0, pair.second] < RATIO * distances[:, third].min():
            yield pair


def groups(pairs: list[Pair], count: int) -> np.ndarray:
    """A number for each of `count` images, the same for an image and its copies."""
    first, second = np.array([pair[:2] for pair in pairs], dtype=int).reshape(-1, 2).T
    links = coo_array((np.ones(len(pairs)), (first, second)), shape=(count, count))
    return np.asarray(connected_components(links, directed=False)[1])
