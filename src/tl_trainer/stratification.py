"""Images with several labels, divided so that every part has about its share of each label.

Iterative stratification (Sechidis, Tsoumakas and Vlahavas, On the Stratification of Multi-Label Data, ECML PKDD 2011):
of the label that the fewest undivided images have, each goes to the part that lacks most of it. What may not be
divided, such as the images of a patient, counts as one; the packages that exist know no groups.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np


def stratified(targets: np.ndarray, shares: Sequence[float], seed: int, groups: Sequence[object] = ()) -> list[int]:
    """The number of each image's part.

    targets: (N, L), 1 where an image has a label. shares: of all images, the part of each. groups: of the images, if
    any; none of them is divided.
    """
    number = {group: at for at, group in enumerate(dict.fromkeys(groups))}
    of_group = np.array([number[group] for group in groups] if groups else range(len(targets)))
    sizes = np.bincount(of_group).astype(float)
    labels = np.zeros((len(sizes), targets.shape[1]))
    np.add.at(labels, of_group, targets == 1)
    lacking = np.outer(shares, np.append(labels.sum(axis=0), sizes.sum()))  # of each part: of each label, of all images
    part, rng = np.full(len(sizes), -1), random.Random(seed)

    def put(members: Sequence[int], column: int) -> None:
        """Give each of the groups to the part that lacks most of a label or, in the last column, of images."""
        order = sorted(members, key=lambda _: rng.random())
        for at in sorted(order, key=lambda at: -sizes[at]):  # what is large is hard to place later
            most = np.lexsort((lacking[:, -1], lacking[:, column]))[-1]
            part[at] = most
            lacking[most] -= np.append(labels[at], sizes[at])

    while True:
        left = part < 0
        having = (labels[left] > 0).sum(axis=0)
        if not having.any():
            break
        rarest = int(np.where(having > 0, having, np.inf).argmin())
        put(np.flatnonzero(left & (labels[:, rarest] > 0)).tolist(), rarest)
    put(np.flatnonzero(part < 0).tolist(), -1)
    return [int(of) for of in part[of_group]]


def with_copies(groups: Sequence[str], hashes: Sequence[bytes]) -> Sequence[str]:
    """The group of each image, where groups that share an image are one."""
    joined: dict[str, str] = {}

    def of(group: str) -> str:
        while group in joined:
            group = joined[group]
        return group

    first: dict[bytes, str] = {}
    for group, digest in zip(groups, hashes, strict=bool(hashes)):
        if (one := of(first.setdefault(digest, group))) != (other := of(group)):
            joined[other] = one
    return [*map(of, groups)]
