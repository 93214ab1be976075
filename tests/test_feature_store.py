"""The feature store: what was appended is found and taken bit for bit; kills, cuts and flipped bits cost rows, never
give wrong ones; room is made by removing what was not used for longest."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import json
import logging
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from forked import forked
from tl_trainer import feature_store
from tl_trainer.errors import DataError, RunError
from tl_trainer.feature_folders import clear, description_of, folder_size, make_room
from tl_trainer.feature_store import ABANDONED_SECONDS, RECORD_BYTES, FeatureStore
from tl_trainer.ground.digests import SIZE, Digests

SHAPE = (5,)
ROW_BYTES = 20
STORES = ["0" * 32, "1" * 32, "2" * 32]


def key(number: int) -> bytes:
    return number.to_bytes(4, "big") * (SIZE // 4)


def row(number: int, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(dtype)


def rows(numbers: list[int], shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.stack([row(number, shape, dtype) for number in numbers])


def keys(numbers: list[int]) -> list[bytes]:
    return [key(number) for number in numbers]


def lacking(store: FeatureStore, wanted: list[bytes]) -> list[bytes]:
    """The keys that the store lacks."""
    return [wanted[place] for place in store.lacking(Digests.of(wanted))]


def taken(store: FeatureStore, wanted: list[bytes]) -> Tensor:
    """The rows of the keys."""
    return store.take(store.rows(Digests.of(wanted)))


def add(store: FeatureStore, numbers: list[int]) -> None:
    store.append(keys(numbers), rows(numbers))


def filled(folder: Path, count: int = 8) -> FeatureStore:
    store = FeatureStore(folder)
    add(store, list(range(count)))
    store.close()
    return store


def only(folder: Path, ending: str) -> Path:
    (path,) = folder.glob(f"*{ending}")
    return path


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, size: int, *, old: bool = True) -> None:
    os.truncate(path, size)
    if old:
        age(path.parent)


def age(folder: Path) -> None:
    """Make the files look as if no run wrote to them any more."""
    for path in folder.iterdir():
        written = path.stat().st_mtime - 2 * ABANDONED_SECONDS
        os.utime(path, (written, written))


def assert_holds(store: FeatureStore, numbers: list[int]) -> None:
    assert lacking(store, keys(numbers)) == []
    assert torch.equal(taken(store, keys(numbers)), rows(numbers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(7,), (3, 4, 5)])
def test_round_trip(tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    written = rows(list(range(9)), shape, dtype)
    written[0].view(-1)[:3] = torch.tensor([float("nan"), float("-inf"), -0.0])
    store = FeatureStore(tmp_path / "store")
    assert lacking(store, keys([3, 1])) == keys([3, 1])
    store.append(keys([0, 1, 2, 3]), written[:4])
    store.append(keys([4, 5, 6, 7, 8]), written[4:])
    store.close()
    for reader in (store, FeatureStore(tmp_path / "store")):
        assert lacking(reader, keys([8, 20, 0, 10, 20, 1])) == keys([20, 10])
        order = [7, 0, 8, 8, 3]
        found = taken(reader, keys(order))
        assert found.dtype == dtype
        assert found.shape == (5, *shape)
        assert torch.equal(bits(found), bits(written[order]))
        assert reader.row_bytes == written[0].numel() * written.element_size()


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.int32 if values.dtype == torch.float32 else torch.int16)


def test_rows_in_any_memory_layout(tmp_path: Path) -> None:
    images = rows([1, 2], (3, 4, 5))
    store = FeatureStore(tmp_path / "store")
    store.append(keys([1, 2]), images.to(memory_format=torch.channels_last))
    store.append(keys([3, 4]), rows([3, 4], (5, 4, 3)).transpose(1, 3))
    store.close()
    assert torch.equal(taken(store, keys([1, 2])), images)
    assert torch.equal(taken(store, keys([3, 4])), rows([3, 4], (5, 4, 3)).transpose(1, 3))


def test_rows_are_found_after_close_and_need_no_close_to_be_kept(tmp_path: Path) -> None:
    writer = FeatureStore(tmp_path / "store")
    add(writer, [1, 2])
    assert_holds(FeatureStore(tmp_path / "store"), [2, 1])
    writer.close()
    assert_holds(writer, [1, 2])
    writer.close()
    assert_holds(writer, [1, 2])


def test_nothing_to_take(tmp_path: Path) -> None:
    assert taken(filled(tmp_path / "store"), []).shape == (0, *SHAPE)


def test_take_refuses_a_row_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"was removed or changed .*features\.limit_gb"):
        taken(filled(tmp_path / "store"), keys([0, 99]))


def test_append_refuses_rows_of_another_shape(tmp_path: Path) -> None:
    store = filled(tmp_path / "store")
    with pytest.raises(DataError, match=r"images of different sizes.*CenterCrop"):
        store.append(keys([99]), rows([99], (6,)))
    store.close()
    assert_holds(store, list(range(8)))


def test_two_writers_at_once(tmp_path: Path) -> None:
    one, two = FeatureStore(tmp_path / "store"), FeatureStore(tmp_path / "store")
    for first in range(0, 12, 4):
        add(one, [first, first + 1])
        add(two, [first + 2, first + 3])
    add(one, [50, 51])  # both compute these
    add(two, [51, 50])
    one.close()
    assert_holds(one, [11, 0, 51, 50])
    add(two, [12])
    two.close()
    assert_holds(two, [*range(13), 50, 51])
    assert lacking(one, keys([12])) == keys([12])
    one.refresh()
    assert_holds(one, [*range(13), 50, 51])
    assert len(list((tmp_path / "store").glob("*.rows"))) == 2


def test_rows_of_many_segments_come_in_the_order_asked_for(tmp_path: Path) -> None:
    for number in range(6):
        store = FeatureStore(tmp_path / "store")
        add(store, [number, number + 10])
        store.close()
    assert_holds(FeatureStore(tmp_path / "store"), [13, 2, 0, 15, 5, 3, 11, 10, 1, 4, 14, 12])


def append_for_ever(folder: Path, pipe: Connection) -> None:
    store = FeatureStore(folder)
    for batch in itertools.count():
        add(store, list(range(batch * 16, batch * 16 + 16)))
        pipe.send(batch)


def test_a_killed_writer_leaves_whole_rows_only(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    process, pipe = forked(append_for_ever, folder)
    done = [pipe.recv() for _ in range(5)]
    process.kill()
    process.join()
    with contextlib.suppress(EOFError):
        while True:
            done.append(pipe.recv())
    finished = 16 * len(done)
    assert finished >= 80
    store = FeatureStore(folder)
    asked = list(range(finished + 64))
    missing = lacking(store, keys(asked))
    present = [number for number in asked if key(number) not in missing]
    assert set(range(finished)) <= set(present)
    assert torch.equal(taken(store, keys(present)), rows(present))
    rest = [number for number in asked if key(number) in missing]
    add(store, rest)
    store.close()
    assert_holds(FeatureStore(folder), asked)


Damage = Callable[[Path], None]

DAMAGES: list[tuple[str, Damage, list[int]]] = [
    ("rows cut within a row", lambda folder: cut(only(folder, ".rows"), 5 * ROW_BYTES + 3), [5, 6, 7]),
    ("rows cut between rows", lambda folder: cut(only(folder, ".rows"), 6 * ROW_BYTES), [6, 7]),
    ("rows empty", lambda folder: cut(only(folder, ".rows"), 0), list(range(8))),
    ("rows gone", lambda folder: only(folder, ".rows").unlink(), list(range(8))),
    ("records cut within a record", lambda folder: cut(only(folder, ".keys"), 5 * RECORD_BYTES + 33), [5, 6, 7]),
    ("records cut between records", lambda folder: cut(only(folder, ".keys"), 6 * RECORD_BYTES), [6, 7]),
    ("records cut within the first", lambda folder: cut(only(folder, ".keys"), 1), list(range(8))),
    ("first bit of a row", lambda folder: flip(only(folder, ".rows"), 3 * ROW_BYTES), [3]),
    ("last bit of a row", lambda folder: flip(only(folder, ".rows"), 8 * ROW_BYTES - 1, 7), [7]),
    ("two rows", lambda folder: [flip(only(folder, ".rows"), at * ROW_BYTES) for at in (1, 4)], [1, 4]),
    ("a bit of a key", lambda folder: flip(only(folder, ".keys"), 2 * RECORD_BYTES + 5), [2]),
    ("a row's checksum", lambda folder: flip(only(folder, ".keys"), 2 * RECORD_BYTES + SIZE), [2]),
    ("a record's checksum", lambda folder: flip(only(folder, ".keys"), 3 * RECORD_BYTES - 1), [2]),
    ("store.json of another shape", lambda folder: flip(folder / "store.json", shape_position(folder)), list(range(8))),
    ("store.json no JSON", lambda folder: flip(folder / "store.json", 0), list(range(8))),
    ("store.json no text", lambda folder: flip(folder / "store.json", 2, 7), list(range(8))),
    ("store.json empty", lambda folder: cut(folder / "store.json", 0), list(range(8))),
]


def shape_position(folder: Path) -> int:
    return (folder / "store.json").read_bytes().index(b"5")


@pytest.mark.parametrize(("damage", "lost"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damage_is_detected_reported_once_and_repaired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Damage, lost: list[int]
) -> None:
    folder, everything = tmp_path / "store", list(range(8))
    filled(folder)
    damage(folder)
    store = FeatureStore(folder)
    assert sorted(lacking(store, keys(everything))) == sorted(keys(lost))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert str(folder) in caplog.text
    intact = [number for number in everything if number not in lost]
    if intact:
        assert torch.equal(taken(store, keys(intact)), rows(intact))

    caplog.clear()
    add(store, lost)
    store.close()
    assert_holds(store, everything)
    assert_holds(FeatureStore(folder), everything)
    assert not caplog.records


@pytest.mark.parametrize("again", range(6))
def test_a_damaged_row_stays_out_in_whatever_order_segments_are_read(tmp_path: Path, again: int) -> None:
    """Segments have random names, and of two that have the same row the one read last counts."""
    folder = tmp_path / "store"
    for _ in range(2):
        writer = FeatureStore(folder)
        add(writer, [0, 1])
        writer.close()
    for path in folder.glob("*.rows"):
        flip(path, 0)
    store = FeatureStore(folder)
    assert lacking(store, keys([0, 1])) == keys([0])
    add(store, [0])
    store.close()
    assert torch.equal(taken(store, keys([0, 1])), rows([0, 1]))
    assert_holds(FeatureStore(folder), [0, 1])


def test_what_a_living_writer_has_not_finished_is_left_alone(tmp_path: Path) -> None:
    """Only a segment that nobody wrote for a minute is trimmed."""
    filled(tmp_path / "store")
    records = only(tmp_path / "store", ".keys")
    whole = records.read_bytes()
    cut(records, 5 * RECORD_BYTES + 7, old=False)
    assert lacking(FeatureStore(tmp_path / "store"), keys([4, 5])) == keys([5])
    assert records.read_bytes() == whole[: 5 * RECORD_BYTES + 7]
    records.write_bytes(whole)
    assert_holds(FeatureStore(tmp_path / "store"), list(range(8)))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255), name=st.sampled_from(["rows", "keys", "json"])
)
def test_no_changed_byte_ever_gives_a_wrong_row(tmp_path: Path, place: float, byte: int, name: str) -> None:
    folder = tmp_path / "store"
    if not folder.exists():
        filled(folder)
        one_more = FeatureStore(folder)
        add(one_more, [3, 20])
        one_more.close()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    try:
        for path in sorted(folder.glob(f"*.{name}")):
            data = bytearray(before[path])
            data[int(place * len(data))] ^= byte
            path.write_bytes(data)
        store = FeatureStore(folder)
        asked = [*range(8), 20]
        missing = lacking(store, keys(asked))
        present = [number for number in asked if key(number) not in missing]
        assert not present or torch.equal(taken(store, keys(present)), rows(present))
        if name != "json":
            assert len(present) >= 6
        lost = [number for number in asked if key(number) in missing]
        if lost:
            add(store, lost)
            store.close()
        assert_holds(FeatureStore(folder), asked)
    finally:
        for path in folder.iterdir():
            path.unlink()
        for path, data in before.items():
            path.write_bytes(data)


class _FullDisk(io.RawIOBase):
    """A file on a disk with `room` bytes left."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = min(self.room, len(memoryview(data).cast("B")))
        if not taken:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.room -= taken
        return taken


@pytest.mark.parametrize("ending", [".rows", ".keys"])
def test_a_full_disk_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    folder = tmp_path / "store"
    filled(folder)
    store, open_file = FeatureStore(folder), Path.open

    def open_full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "wb" and self.suffix == ending:
            self.touch()
            return io.BufferedWriter(_FullDisk(room=30))
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(RunError, match=r"No space left on device; free some space or set features\.dir") as caught:
        add(store, [20, 21])
    assert str(folder) in str(caught.value)
    monkeypatch.undo()
    store.close()
    reopened = FeatureStore(folder)
    assert lacking(reopened, keys([20, 21])) == keys([20, 21])
    assert_holds(reopened, list(range(8)))


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EIO])
def test_a_segment_with_a_damaged_row_that_cannot_be_written_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reason: int
) -> None:
    folder = tmp_path / "store"
    filled(folder)
    flip(only(folder, ".rows"), 0)
    store, open_file = FeatureStore(folder), Path.open

    def refuse(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode == "r+b":
            raise OSError(reason, os.strerror(reason))
        return open_file(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    if reason == errno.EACCES:  # another user's
        assert lacking(store, keys([0, 1])) == keys([0])
    else:
        with pytest.raises(RunError, match=r"damaged and cannot be repaired: Input/output error; remove"):
            lacking(store, keys([0]))


def test_a_store_that_vanishes_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run may remove it to make room."""
    filled(tmp_path / "store")
    store = FeatureStore(tmp_path / "store")
    size = feature_store._size

    def vanish(path: Path) -> int:
        found = size(path)
        path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(feature_store, "_size", vanish)
    store.refresh()
    assert lacking(store, keys([1])) == keys([1])


@pytest.mark.parametrize("ending", [".keys", ".rows"])
def test_of_segments_that_may_not_be_read_only_their_own_rows_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, ending: str
) -> None:
    filled(tmp_path / "store")
    closed = only(tmp_path / "store", ending)
    store = FeatureStore(tmp_path / "store")
    add(store, [8, 9])
    store.close()
    for name in ("fromfile", "memmap"):
        opened = getattr(feature_store.np, name)

        def refusing(path: Path, *arguments: Any, opened: Callable[..., Any] = opened, **options: Any) -> Any:
            if path == closed:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return opened(path, *arguments, **options)

        monkeypatch.setattr(feature_store.np, name, refusing)
    store = FeatureStore(tmp_path / "store")
    assert lacking(store, keys(list(range(10)))) == keys(list(range(8)))
    assert_holds(store, [8, 9])
    add(store, list(range(8)))
    store.close()
    assert not store.in_memory
    assert_holds(store, list(range(10)))
    [warning] = [record.getMessage() for record in caplog.records]
    assert warning.endswith(".keys cannot be read (Permission denied); what it holds is computed again")


def make_stores(root: Path, ages: dict[str, int], size: int = 100) -> None:
    for name, seconds in ages.items():
        (root / name).mkdir(parents=True)
        description = json.dumps(description_of((2,), torch.float32))
        (root / name / "store.json").write_text(description)
        (root / name / f"{'ab' * 16}.rows").write_bytes(bytes(size - len(description)))
        os.utime(root / name, (1e9 - seconds, 1e9 - seconds))


@pytest.mark.parametrize(
    ("needed", "left"),
    [(0, STORES), (50, STORES), (51, ["0" * 32, "1" * 32]), (150, ["0" * 32, "1" * 32]), (151, ["1" * 32])],
)
def test_make_room_removes_what_was_not_used_for_longest_and_never_keep(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, needed: int, left: list[str]
) -> None:
    caplog.set_level(logging.INFO)
    make_stores(tmp_path, {STORES[0]: 10, STORES[1]: 30, STORES[2]: 20})
    make_room(tmp_path, needed, 350, keep={tmp_path / STORES[1]})
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == left
    assert len(caplog.records) == 3 - len(left)
    make_room(tmp_path, 10_000, 350, keep={tmp_path / STORES[1]})
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [STORES[1]]


def test_room_is_made_and_the_cache_cleared_without_touching_other_folders(tmp_path: Path) -> None:
    make_stores(tmp_path, dict.fromkeys(STORES, 0))
    (tmp_path / "files.sqlite").write_bytes(b"database")
    nearly = ["A" * 32, "a" * 31, "a" * 33, "g" * 32, f"x{'a' * 32}", f"{'a' * 32}x", f"{'a' * 16} {'a' * 15}"]
    make_stores(tmp_path, dict.fromkeys(nearly, 99))  # with all that a store has but its name
    make_room(tmp_path, 1, 0, keep={tmp_path / STORES[1]})
    others = {"files.sqlite", *nearly}
    assert {path.name for path in tmp_path.iterdir()} == {STORES[1], *others}
    assert clear(tmp_path) == 100
    assert {path.name for path in tmp_path.iterdir()} == others
    assert clear(tmp_path / "nowhere") == 0


@pytest.mark.parametrize("described", [None, "{}", '{"shape": [2], "dtype": "float32", "checksum": 1}', "[" * 99])
def test_a_folder_that_only_has_a_stores_name_is_never_touched(tmp_path: Path, described: str | None) -> None:
    folder = tmp_path / ("ab" * 16)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    if described is not None:
        (folder / "store.json").write_text(described)
    make_room(tmp_path, 10**9, 0, keep={tmp_path / "other"})
    assert clear(tmp_path) == 0
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_what_somebody_put_into_a_store_stays(tmp_path: Path) -> None:
    make_stores(tmp_path, {STORES[0]: 0})
    (tmp_path / STORES[0] / "thesis.txt").write_text("years of work")
    (tmp_path / "outside.rows").write_text("elsewhere")
    (tmp_path / STORES[0] / f"{'cd' * 16}.rows").symlink_to(tmp_path / "outside.rows")
    assert clear(tmp_path) == 100
    assert sorted(path.name for path in (tmp_path / STORES[0]).iterdir()) == [f"{'cd' * 16}.rows", "thesis.txt"]
    (tmp_path / STORES[1]).symlink_to(tmp_path / STORES[0])
    assert clear(tmp_path) == 0
    FeatureStore(tmp_path / STORES[0])  # with no description of its own it begins anew
    assert (tmp_path / STORES[0] / "thesis.txt").exists()
    assert (tmp_path / "outside.rows").read_text() == "elsewhere"


def test_folder_size(tmp_path: Path) -> None:
    make_stores(tmp_path, dict.fromkeys(STORES, 0), size=70)
    (tmp_path / STORES[0] / "deeper").mkdir()
    (tmp_path / STORES[0] / "deeper" / "file").write_bytes(bytes(7))
    assert folder_size(tmp_path) == 217
    assert folder_size(tmp_path / "nowhere") == 0


def test_folder_size_while_another_run_removes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stores(tmp_path, dict.fromkeys(STORES, 0))
    is_file = Path.is_file

    def vanish(self: Path) -> bool:
        found = is_file(self)
        if self.parent.name == STORES[0]:
            self.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", vanish)
    assert folder_size(tmp_path) == 200
