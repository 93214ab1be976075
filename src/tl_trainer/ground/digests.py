"""SHA-256 digests as a column: 32 bytes each, where Python's objects take 80, and looked up all at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np

SIZE = 32  # bytes
_AT_ONCE = 1 << 16  # that are looked up, so that no second copy of them all is ever in memory

Numbers = np.ndarray[Any, Any]  # (N,) int64


class Digests(Sequence[bytes]):
    """values: (N, 32) uint8."""

    def __init__(self, values: Numbers) -> None:
        self.values = values

    @classmethod
    def of(cls, digests: Iterable[bytes]) -> Digests:
        """These digests as a column; one that is a column already as it is."""
        if isinstance(digests, Digests):
            return digests
        return cls(np.frombuffer(b"".join(digests), np.uint8).reshape(-1, SIZE))

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> Digests: ...
    def __getitem__(self, index: int | slice) -> bytes | Digests:
        return Digests(self.values[index]) if isinstance(index, slice) else self.values[index].tobytes()

    def __iter__(self) -> Iterator[bytes]:
        for row in self.values:
            yield row.tobytes()

    def take(self, indices: Sequence[int] | Numbers) -> Digests:
        """Those at the indices, in their order."""
        return Digests(self.values[np.asarray(indices, np.int64)])

    @property
    def words(self) -> Numbers:
        """Each as four numbers of 64 bits, (N, 4)."""
        return np.ascontiguousarray(self.values).view(np.uint64)

    def first(self) -> Numbers:
        """Where each different one is for the first time, in order."""
        _, found = np.unique(self.words[:, 0], return_index=True)
        if len(found) < len(self):  # else all differ, and one number tells them sooner than all their bytes
            _, found = np.unique(np.ascontiguousarray(self.values).view(f"S{SIZE}")[:, 0], return_index=True)
        return np.sort(found)


class Index:
    """Which number belongs to each digest; of one that is there twice the last."""

    def __init__(self, digests: Digests, numbers: Numbers) -> None:
        order = np.argsort(digests.words[:, 0], kind="stable")
        self.words, self.numbers = digests.words[order], numbers[order]
        self._first = self.words[:, 0].copy()

    @classmethod
    def of(cls, parts: Sequence[tuple[Digests, Numbers]]) -> Index:
        """Those of all parts."""
        digests = [np.zeros((0, SIZE), np.uint8), *(part.values for part, _ in parts)]
        return cls(
            Digests(np.concatenate(digests)), np.concatenate([np.zeros(0, np.int64), *(part for _, part in parts)])
        )

    def find(self, wanted: Digests) -> Numbers:
        """The numbers of digests, -1 for one that is not there."""
        parts = [self._found(wanted[at : at + _AT_ONCE].words) for at in range(0, len(wanted), _AT_ONCE)]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def _found(self, wanted: Numbers) -> Numbers:
        found, left = np.full(len(wanted), -1), np.arange(len(wanted))
        place = np.searchsorted(self._first, wanted[:, 0], "right") - 1
        while len(left):  # once, unless the first words of two digests are alike
            there = (place >= 0) & (self._first[place] == wanted[left, 0]) if len(self._first) else place >= 0
            left, place = left[there], place[there]
            same = (self.words[place] == wanted[left]).all(axis=1)
            found[left[same]] = self.numbers[place[same]]
            left, place = left[~same], place[~same] - 1
        return found

    def joined(self, digests: Digests, numbers: Numbers) -> Index:
        """With more of them, which count instead of those that are there."""
        return Index.of([(Digests(self.words.view(np.uint8)), self.numbers), (digests, numbers)])
