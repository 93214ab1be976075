"""Digests as a column, against lists and dicts of bytes."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tl_trainer.ground import digests as module_under_test
from tl_trainer.ground.digests import SIZE, Digests, Index


def digests(numbers: list[int]) -> list[bytes]:
    return [hashlib.sha256(b"%d" % number).digest() for number in numbers]


ODD = [bytes(SIZE), bytes(SIZE - 1) + b"\1", b"\1" + bytes(SIZE - 1), b"\1" * 8 + bytes(SIZE - 8), b"\1" * SIZE]


def test_a_column_is_the_sequence_it_was_made_of() -> None:
    plain = [*digests([3, 1, 2]), *ODD]
    column = Digests.of(iter(plain))
    assert ([*column], len(column), column[1], [*column[1:3]]) == (plain, len(plain), plain[1], plain[1:3])
    assert [column[-1], *column.take([2, 0, 2])] == [plain[-1], plain[2], plain[0], plain[2]]
    assert Digests.of(column) is column
    assert [*Digests.of([])] == [*column.take([])] == []
    with pytest.raises(IndexError):
        column[len(plain)]


@pytest.mark.parametrize(
    "plain", [[], digests([1, 2, 3]), digests([2, 2, 1, 3, 1]), ODD, [*ODD, *ODD], [*reversed(ODD)]]
)
def test_the_first_of_each_is_found(plain: list[bytes]) -> None:
    assert Digests.of(plain).first().tolist() == [plain.index(one) for one in dict.fromkeys(plain)]


@pytest.mark.parametrize("at_once", [2, 1 << 16])
def test_an_index_is_a_dict(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of digests whose first 8 bytes are alike; of one that is there twice the last counts."""
    monkeypatch.setattr(module_under_test, "_AT_ONCE", at_once)
    there, absent = [*digests([5, 6, 7, 5]), *ODD, *ODD[:2]], [*digests([8]), b"\1" * 9 + bytes(SIZE - 9)]
    index = Index(Digests.of(there), np.arange(10, 10 + len(there)))
    expected = dict(zip(there, range(10, 10 + len(there)), strict=True))
    asked = [*absent, *reversed(there), *absent]
    assert index.find(Digests.of(asked)).tolist() == [expected.get(one, -1) for one in asked]
    more = index.joined(Digests.of([absent[0], there[0]]), np.array([1, 2]))
    assert more.find(Digests.of([absent[0], there[0], there[1], absent[1]])).tolist() == [1, 2, 11, -1]


def test_nothing_is_in_an_empty_index() -> None:
    assert Index.of([]).find(Digests.of(digests([1, 2]))).tolist() == [-1, -1]
    assert Index.of([]).find(Digests.of([])).tolist() == []
