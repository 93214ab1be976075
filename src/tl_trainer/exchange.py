"""Feature rows from the rank that has computed them to those that cannot see its folder."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from torch import Tensor

from tl_trainer.feature_store import ROWS_AT_ONCE, FeatureStore
from tl_trainer.ground import distributed


def exchange(store: FeatureStore, keys: Sequence[bytes]) -> None:
    """Have all ranks find the rows of all keys, of which each is in the store of one rank or more.

    Where they share a folder nothing is sent. Else the first rank of a host writes what that lacks, and its others find
    it there; where the folder cannot be written to, each keeps all rows in memory.
    """
    for receives in (distributed.local_rank() == 0, True):
        if not store.in_memory:
            store.refresh()
        lacking = {number for number, key in enumerate(keys) if key not in store.index}
        of_rank = distributed.gathered(lacking)
        sources: dict[int, list[int]] = {}
        for number in sorted(set().union(*of_rank)):
            sources.setdefault(next(rank for rank, of in enumerate(of_rank) if number not in of), []).append(number)
        if not sources:
            return
        with contextlib.closing(store):
            for source, numbers in sources.items():
                for first in range(0, len(numbers), ROWS_AT_ONCE):
                    block = numbers[first : first + ROWS_AT_ONCE]
                    rows = distributed.from_rank(source, lambda: _rows(store, keys, block))  # noqa: B023 (called here)
                    own = [place for place, number in enumerate(block) if number in lacking]
                    if own and (receives or store.in_memory):
                        store.append([keys[block[place]] for place in own], rows[own])


def _rows(store: FeatureStore, keys: Sequence[bytes], numbers: Sequence[int]) -> Tensor:
    return store.take([keys[number] for number in numbers])
