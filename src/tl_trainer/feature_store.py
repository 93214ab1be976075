"""Feature rows on disk, by key: append-only, memory-mapped, safe against kills, torn writes and flipped bits.

A store is a folder with one shape and one precision. Every process that computes rows appends them to a segment of its
own, a file of raw rows and a file of records (key, checksum of the row, checksum of the record), in the same order and
the row first. So nobody waits for a lock, two processes can fill one store at once, and a row without a whole record
does not exist. What is damaged is blanked where it was found, so that it is reported once and never found again.

The store may be another user's. What can be read of it is used, and rows that may not be written are kept in memory.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
import uuid
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tl_trainer.errors import DataError, RunError
from tl_trainer.feature_folders import description_in, description_of, remove
from tl_trainer.ground.digests import SIZE, Digests, Index, Numbers
from tl_trainer.ground.files import write_text

log = logging.getLogger(__name__)

_RECORD = np.dtype([("key", "u1", SIZE), ("row_sum", "<u4"), ("record_sum", "<u4")])
_CHECKED_BYTES = SIZE + 4
RECORD_BYTES = _RECORD.itemsize  # of a row in a .keys file
_BLANK = bytes(RECORD_BYTES)

# A segment that was not written for so long has no writer any more, who would finish what looks cut off.
ABANDONED_SECONDS = 60.0

FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)  # the file is another user's, or everything is read-only

ROWS_AT_ONCE = 1024  # that are copied, so that no second copy of them all is ever in memory


class _Rows(NamedTuple):
    """A segment as it was read: its file of records, its rows, and their checksums."""

    records: Path | None  # None: they are in memory only
    rows: np.ndarray[Any, Any]
    checksums: np.ndarray[Any, Any]


class FeatureStore:
    """The rows in `folder`. `find` says which keys are there, `append` adds rows, `take` reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = Index.of([])  # of each key its row, counted through all segments
        self.segments: list[_Rows] = []
        self._ends = [0]  # how many rows there are before each segment, and in all
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self._writer: _Segment | _Memory | None = None
        self._left_out: set[tuple[Path, int]] = set()  # damaged rows of segments that may be another user's
        self._unreadable: set[Path] = set()  # what that is said of
        with _where_allowed():
            folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Read what is there now, leaving out, with a warning, what is damaged."""
        self.index, self.segments, self._ends, self._readable = Index.of([]), [], [0], True
        try:
            described, paths = self._read_description(), sorted(self.folder.glob("*.keys"))
        except PermissionError as error:
            self._readable = False
            self._say_unreadable(self.folder, error)
            return
        keys: list[tuple[Digests, Numbers]] = []
        for path in paths if described else []:
            try:
                keys.append(self._read_segment(path))
            except FileNotFoundError:  # another run has just removed this store to make room
                continue
            except PermissionError as error:
                self._say_unreadable(path, error)
        self.index = Index.of(keys)

    def lacking(self, keys: Digests) -> Numbers:
        """Where the keys are that are `absent`, or whose rows do not have their checksums any more."""
        while damaged := [row for row in np.unique(self.index.find(keys)) if row >= 0 and not self._intact(row)]:
            log.warning("%d cached features in %s are damaged and are computed again", len(damaged), self.folder)
            for row in damaged:
                segment, number = self._place(row)
                if segment.records:
                    self._leave_out(segment.records, [number])
            self.refresh()  # another segment may have the row too, and that one may be damaged as well
        return self.absent(keys)

    def absent(self, keys: Digests) -> Numbers:
        """Where the keys are that are not there; each different one once."""
        absent = np.flatnonzero(self.index.find(keys) < 0)
        return absent[keys.take(absent).first()]

    def append(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Add rows (N, ...) under their keys.

        Raises RunError where the disk is full, DataError for rows of another shape than those that are there.
        """
        self._writer = self._writer or self._new_writer()
        if not self.shape:
            self.shape, self.dtype = tuple(rows.shape[1:]), rows.dtype
            if not self.in_memory:
                write_text(self.folder / "store.json", json.dumps(description_of(self.shape, self.dtype)))
        if tuple(rows.shape[1:]) != self.shape:
            raise DataError(
                f"the transforms give images of different sizes: their features are {tuple(rows.shape[1:])} and "
                f"{self.shape}; end them with a crop or a Resize to [height, width], e.g. {{CenterCrop: 224}}"
            )
        try:
            self._writer.append(keys, _as_numbers(rows))
        except OSError as error:
            with contextlib.suppress(OSError):  # closing tries once more to write what is left
                self._writer.close()
            self._writer = None
            raise self._unwritable(error) from error

    def close(self) -> None:
        """End this process's segment, if it wrote one, and read everything again."""
        writer, self._writer = self._writer, None
        if isinstance(writer, _Segment):
            writer.close()
            self.refresh()
        elif writer is not None and writer.keys:
            keys, first = Digests.of(writer.keys), self._ends[-1]
            self.index = self.index.joined(keys, np.arange(first, first + len(keys)))
            self._add(writer.segment())

    @property
    def in_memory(self) -> bool:
        """Whether what is appended is kept in memory, since it may not be written."""
        return isinstance(self._writer, _Memory) or any(segment.records is None for segment in self.segments)

    def rows(self, keys: Digests) -> Numbers:
        """The rows of the keys, for `take`. Raises RunError where one is not there."""
        rows = self.index.find(keys)
        if (rows < 0).any():
            raise RunError(
                f"{self.folder} was removed or changed while it was in use; run it again, and with a higher "
                "features.limit_gb if another run made room for its own features"
            )
        return rows

    def take(self, rows: Numbers) -> Tensor:
        """The rows, in their order, as one tensor (N, ...)."""
        numbers = np.empty((len(rows), self._row_numbers), dtype=self._number)
        segments = np.searchsorted(self._ends, rows, "right") - 1
        for segment in np.unique(segments):
            chosen = np.flatnonzero(segments == segment)
            for first in range(0, len(chosen), ROWS_AT_ONCE):
                block = chosen[first : first + ROWS_AT_ONCE]
                numbers[block] = self.segments[segment].rows[rows[block] - self._ends[segment]]
        return torch.from_numpy(numbers).view(self.dtype).view(len(rows), *self.shape)

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return self._row_numbers * self._number.itemsize

    def _add(self, segment: _Rows) -> None:
        self.segments.append(segment)
        self._ends.append(self._ends[-1] + len(segment.rows))

    def _place(self, row: int) -> tuple[_Rows, int]:
        """The segment of a row, and its number there."""
        segment = bisect_right(self._ends, row) - 1
        return self.segments[segment], row - self._ends[segment]

    @property
    def _number(self) -> np.dtype[Any]:
        return np.dtype(np.uint32 if self.dtype == torch.float32 else np.uint16)  # numpy has no bf16: bits are enough

    @property
    def _row_numbers(self) -> int:
        return int(np.prod(self.shape))

    def _new_writer(self) -> _Segment | _Memory:
        try:
            with _where_allowed():
                return _Segment(self.folder) if self._readable else _Memory()
        except OSError as error:
            raise self._unwritable(error) from error
        return _Memory()

    def _unwritable(self, error: OSError) -> RunError:
        return RunError(
            f"cannot write features to {self.folder}: {error.strerror}; free some space or set features.dir"
        )

    def _leave_out(self, records: Path, numbers: list[int]) -> None:
        """Blank damaged records, or where that is not allowed forget them."""
        self._left_out.update((records, number) for number in numbers)
        _blank(records, numbers)

    def _say_unreadable(self, path: Path, error: PermissionError) -> None:
        if path not in self._unreadable:
            log.warning("%s cannot be read (%s); what it holds is computed again", path, error.strerror)
        self._unreadable.add(path)

    def _read_description(self) -> bool:
        path = self.folder / "store.json"
        if not path.exists():
            return False
        with path.open("rb"):  # PermissionError: not damaged, but another user's
            pass
        if (found := description_in(path)) is None:
            log.warning("%s is damaged; its features are computed again", path)
            remove(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.shape = ()
            return False
        self.shape, self.dtype = found
        return True

    def _read_segment(self, path: Path) -> tuple[Digests, Numbers]:
        """The keys of a segment, and their rows."""
        rows_path = path.with_suffix(".rows")
        rows_before = _size(rows_path)  # before the records, for while they are read another run may add both
        records = np.fromfile(path, dtype=_RECORD, count=_size(path) // RECORD_BYTES)
        there, before = _size(rows_path) // self.row_bytes, self._ends[-1]
        shape, sound, damaged = (min(there, len(records)), self._row_numbers), array("q"), []
        rows = np.memmap(rows_path, dtype=self._number, mode="r", shape=shape) if shape[0] else None
        for number in range(len(records)):
            record = records[number].tobytes()
            if record == _BLANK or (path, number) in self._left_out:
                continue
            if number < there and zlib.crc32(record[:_CHECKED_BYTES]) == records["record_sum"][number]:
                sound.append(number)
            else:
                damaged.append(number)
        if damaged:
            log.warning("%s: %d features are damaged or cut off and are computed again", path, len(damaged))
            self._leave_out(path, damaged)
        if rows is not None:
            self._add(_Rows(path, rows, records["row_sum"].copy()))
        if rows_before > len(records) * self.row_bytes or _size(path) % RECORD_BYTES:
            log.warning("%s has an unfinished end; what it lacks is computed again", path)
            _trim({path: len(records) * RECORD_BYTES, rows_path: len(records) * self.row_bytes})
        own = np.frombuffer(sound, np.int64) if sound else np.zeros(0, np.int64)
        return Digests(records["key"][own]), own + before

    def _intact(self, row: int) -> bool:
        segment, number = self._place(row)
        return zlib.crc32(segment.rows[number].data) == int(segment.checksums[number])


class _Segment:
    """The two files that one process appends to."""

    def __init__(self, folder: Path) -> None:
        name = uuid.uuid4().hex
        self.rows = (folder / f"{name}.rows").open("wb")
        self.keys = (folder / f"{name}.keys").open("wb")

    def append(self, keys: Sequence[bytes], rows: np.ndarray[Any, Any]) -> None:
        self.rows.write(rows.data)
        self.rows.flush()
        for key, row in zip(keys, rows, strict=True):
            checked = key + zlib.crc32(row.data).to_bytes(4, "little")
            self.keys.write(checked + zlib.crc32(checked).to_bytes(4, "little"))
        self.keys.flush()

    def close(self) -> None:
        with self.rows, self.keys:
            pass


class _Memory:
    """What a process keeps of the rows that it may not write."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.rows: list[np.ndarray[Any, Any]] = []

    def append(self, keys: Sequence[bytes], rows: np.ndarray[Any, Any]) -> None:
        self.keys += keys
        self.rows.append(rows)

    def segment(self) -> _Rows:
        rows = np.concatenate(self.rows).view(f"<u{self.rows[0].itemsize}")
        return _Rows(None, rows, np.array([zlib.crc32(row.data) for row in rows]))

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _where_allowed() -> Iterator[None]:
    """The block ends, without an error, at what this user may not write."""
    try:
        yield
    except OSError as error:
        if error.errno not in FORBIDDEN:
            raise


def _as_numbers(rows: Tensor) -> np.ndarray[Any, Any]:
    flat = rows.detach().cpu().contiguous().flatten(1)
    bits = torch.int32 if flat.dtype == torch.float32 else torch.int16
    return flat.view(bits).numpy()


def _blank(records: Path, numbers: Iterable[int]) -> None:
    """Overwrite records with zeros, which stand for no row, where that is allowed. RunError where the disk fails."""
    try:
        with contextlib.suppress(FileNotFoundError), _where_allowed(), records.open("r+b") as file:
            for number in numbers:
                file.seek(number * RECORD_BYTES)
                file.write(_BLANK)
    except OSError as error:
        raise RunError(
            f"{records} is damaged and cannot be repaired: {error.strerror}; remove {records.parent}"
        ) from error


def _trim(sizes: dict[Path, int]) -> None:
    """Cut off what a kill or a full disk left after a segment's last record, unless somebody may still write to it."""
    if all(time.time() - path.stat().st_mtime > ABANDONED_SECONDS for path in sizes):
        for path, size in sizes.items():
            with contextlib.suppress(OSError):  # it is only tidying
                os.truncate(path, min(size, _size(path)))


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
