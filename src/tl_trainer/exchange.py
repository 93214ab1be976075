"""Feature rows from the rank that has computed them to those that cannot see its folder."""

from __future__ import annotations

import contextlib

import numpy as np
import torch

from tl_trainer.feature_store import ROWS_AT_ONCE, FeatureStore
from tl_trainer.ground import distributed
from tl_trainer.ground.digests import Digests


def exchange(store: FeatureStore, keys: Digests) -> None:
    """Have all ranks find the rows of all keys, of which each is in the store of one rank or more.

    Where they share a folder nothing is sent. Else the first rank of a host writes what that lacks, and its others find
    it there; where the folder cannot be written to, each keeps all rows in memory.
    """
    for receives in (distributed.local_rank() == 0, True):
        if not store.in_memory:
            store.refresh()
        of_rank = distributed.gathered(lacking := store.absent(keys))
        left = np.unique(np.concatenate(of_rank))
        if not len(left):
            return
        with contextlib.closing(store):
            for source, of in enumerate(of_rank):
                held, left = left[~np.isin(left, of)], left[np.isin(left, of)]
                for first in range(0, len(held), ROWS_AT_ONCE):
                    block = held[first : first + ROWS_AT_ONCE]
                    rows = distributed.from_rank(source, lambda: store.take(store.rows(keys.take(block))))  # noqa: B023
                    own = np.isin(block, lacking)
                    if own.any() and (receives or store.in_memory):
                        store.append([*keys.take(block[own])], rows[torch.from_numpy(own)])
