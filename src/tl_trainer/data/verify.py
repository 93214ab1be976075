"""The one room that knows what to do about bad images: every image is read once, before anything else.

What was read is remembered in a small database, so that a file whose size and times have not changed is not read
again. After this room a split holds good images only, each with the hash of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tl_trainer.config.data import SKIP_BAD, DataSection
from tl_trainer.data import images
from tl_trainer.data.dataset import Split, Stamp
from tl_trainer.data.images import DarkImages, Decoding, Size
from tl_trainer.errors import DataError, ImageError
from tl_trainer.ground import distributed
from tl_trainer.ground.digests import SIZE, Digests, Numbers
from tl_trainer.ground.machine import cores
from tl_trainer.ground.progress import bar

log = logging.getLogger(__name__)

_CHUNK = 500
_ROWS = 10_000  # of the database that are looked at together
_COLUMNS = [*Stamp._fields, "hash", "width", "height"]
_KINDS = ("blob", "integer", "integer", "integer", "blob", "integer", "integer")
_SOUND = " AND ".join(
    [*(f"typeof({column}) = '{kind}'" for column, kind in zip(_COLUMNS, _KINDS, strict=True)),
     "length(hash) = ?", "min(width, height) > 0", "max(width, height) <= ?"]
)  # fmt: skip
_LARGEST = 2**31 - 1
_MARK = 16  # bytes

Remembered = tuple[bytes, int, int, int, bytes, int, int]  # a row of the database


class _Reading(NamedTuple):
    """An image's hash and size, what `images.dark` says of it, and the mark of the file that was read."""

    digest: bytes
    size: tuple[int, int]
    largest: float
    mark: bytes


@dataclass
class _Readings:
    """Readings of images by their indices, as columns: a rank sends a million of them to another.

    dark: what `images.dark` says of those that are. bad: what is wrong with those that cannot be read.
    """

    indices: array[int] = field(default_factory=lambda: array("q"))
    sizes: array[int] = field(default_factory=lambda: array("i"))
    digests: bytearray = field(default_factory=bytearray)
    marks: bytearray = field(default_factory=bytearray)
    dark: dict[int, float] = field(default_factory=dict)
    bad: dict[int, ImageError] = field(default_factory=dict)

    def add(self, index: int, reading: Future[_Reading]) -> None:
        """One more."""
        try:
            digest, size, largest, mark = reading.result()
        except ImageError as error:
            error.__cause__ = error.__context__ = None  # what is kept of a million of them must not hold their frames
            self.bad[index] = error.with_traceback(None)
            return
        self.indices.append(index)
        self.sizes.extend(size)
        self.digests += digest
        self.marks += mark
        if largest:
            self.dark[index] = largest


class _Contents(NamedTuple):
    """Of each image of a split its hash (N, 32) and its size in pixels (N, 2), which is 0 where neither is known."""

    digests: Numbers
    sizes: Numbers

    @classmethod
    def unknown(cls, count: int) -> _Contents:
        """Those of so many images of which nothing is known."""
        return cls(np.zeros((count, SIZE), np.uint8), np.zeros((count, 2), np.int32))

    @property
    def known(self) -> Numbers:
        """Whether they are known (N,)."""
        return self.sizes[:, 0] > 0

    def put(self, indices: Numbers, digests: Numbers, sizes: Numbers) -> None:
        """Those of some images."""
        self.digests[indices], self.sizes[indices] = digests, sizes

    def of(self, split: Split, indices: Numbers) -> Split:
        """Those images of the split, with their hashes and sizes."""
        seen: dict[tuple[int, int], tuple[int, int]] = {}  # one object for all images of a size, often most of them
        pairs = zip(*(map(int, column[indices]) for column in self.sizes.T), strict=True)
        sizes = [seen.setdefault(size, size) for size in pairs]
        return replace(split.subset(indices), hashes=Digests(self.digests[indices]), sizes=sizes)


class _Marks:
    """What tells each image's file from others, in 16 bytes, the same on all hosts: a stamp's hash, or zeros for none.

    ends: the first and the last path of the stamps.
    """

    def __init__(self, stamps: Iterable[Stamp | None]) -> None:
        marks, self.ends = bytearray(), list[bytes]()
        for stamp in stamps:
            marks += _mark(stamp)
            if stamp:
                low, high = self.ends or (stamp.path, stamp.path)
                self.ends = [min(low, stamp.path), max(high, stamp.path)]
        self.values = np.frombuffer(marks, np.uint64).reshape(-1, 2)
        self._order = np.argsort(self.values[:, 0])
        self._sorted = self.values[self._order, 0]

    def places(self, marks: bytes) -> tuple[Numbers, Numbers]:
        """Which images have one of these marks, and which of them; a file may be there twice."""
        asked = np.frombuffer(marks, np.uint64).reshape(-1, 2)
        first, end = (np.searchsorted(self._sorted, asked[:, 0], side) for side in ("left", "right"))
        which = np.repeat(np.arange(len(asked)), end - first)
        steps = np.arange(len(which)) - np.repeat(np.cumsum(end - first) - (end - first), end - first)
        images = self._order[first[which] + steps]
        same = self.values[images, 1] == asked[which, 1]
        return images[same], which[same]


def _mark(stamp: Stamp | None) -> bytes:
    if stamp is None:
        return bytes(_MARK)
    return hashlib.blake2b(b"%d %d %d " % stamp[1:] + stamp.path, digest_size=_MARK).digest()


def all_verified(
    splits: dict[str, Split], data: DataSection, memory: Memory | None
) -> tuple[dict[str, Split], dict[str, dict[str, str]]]:
    """The splits of a run as `verified` gives them, and of each the images that cannot be read, and why."""
    dark, skipped = DarkImages(), {name: dict[str, str]() for name in splits}
    good = {name: verified(split, name, data, memory, dark, skipped[name]) for name, split in splits.items()}
    dark.warn(f"{sum(map(len, good.values()))} images")
    return good, skipped


def verified(
    split: Split,
    what: str,
    data: DataSection,
    memory: Memory | None,
    dark: DarkImages | None = None,
    skipped: dict[str, str] | None = None,
) -> Split:
    """The split with the content hash and the size of each image, and without those that cannot be read.

    what: what messages call the split. data: says what to do with bad images. memory: of what was read before, if any.
    dark: where dark images are counted, to be named with those of other splits; None: they are named here. skipped:
    where what is wrong with a skipped image is put under its name, if anybody wants to know.
    Raises DataError, naming two of them, for bad images that are not to be skipped, and where no image is left.
    """
    marks = _Marks(map(split.images.stamp, split.rows))
    # What rank 0 remembers holds for all, so that no other has to remember anything.
    contents = distributed.from_first(lambda: _recalled(marks, split, memory))
    bad: dict[int, ImageError] = {}
    unread = np.flatnonzero(~contents.known)
    to_remember = np.zeros(len(split), bool)
    dark_ones: dict[int, float] = {}
    for readings in distributed.together(lambda: _read(split, unread, what)):
        indices = np.array(readings.indices, np.int64)
        digests, sizes = np.frombuffer(readings.digests, np.uint8), np.array(readings.sizes, np.int32)
        contents.put(indices, digests.reshape(-1, SIZE), sizes.reshape(-1, 2))
        # A rank on another host may have read another file.
        to_remember[indices] = (np.frombuffer(readings.marks, np.uint64).reshape(-1, 2) == marks.values[indices]).all(1)
        dark_ones |= readings.dark
        bad |= readings.bad
    counted = dark or DarkImages()
    for index in sorted(dark_ones):
        counted.add(split.name(index), dark_ones[index])
        to_remember[index] = False  # it is named in every run
    if memory and distributed.is_first():
        memory.remember(_remembered(split, contents, marks, np.flatnonzero(to_remember)))
    log.debug("%s images: %d read, %d unchanged since they were", what, len(unread), len(split) - len(unread))
    if dark is None:
        counted.warn(f"{len(split)} {what} images")
    if bad:
        _report(bad, f"{len(split)} {what} images", data)
    if skipped is not None:
        skipped.update((split.name(index), str(bad[index])) for index in sorted(bad))
    good = np.flatnonzero(contents.known)
    if not len(good):
        raise DataError(f"none of the {len(split)} {what} images can be used")
    return contents.of(split, good)


def remembered(split: Split, memory: Memory) -> Split:
    """Those of its images that were read before and are unchanged, with their hashes; none is read."""
    contents = _recalled(_Marks(map(split.images.stamp, split.rows)), split, memory)
    return contents.of(split, np.flatnonzero(contents.known))


def _recalled(marks: _Marks, split: Split, memory: Memory | None) -> _Contents:
    return memory.recalled(marks, split.images.decoding) if memory else _Contents.unknown(len(split))


def _remembered(split: Split, contents: _Contents, marks: _Marks, indices: Numbers) -> Iterator[Remembered]:
    """Rows for the memory of those images whose files are still the same."""
    for index in map(int, indices):
        stamp = split.images.stamp(split.rows[index])
        if stamp and stamp.settled and _mark(stamp) == marks.values[index].tobytes():
            width, height = map(int, contents.sizes[index])
            yield (*stamp, contents.digests[index].tobytes(), width, height)


def _report(bad: dict[int, ImageError], of: str, data: DataSection) -> None:
    listing = "\n".join(str(bad[index]) for index in sorted(bad)[:2])
    if not data.skips_bad:
        raise DataError(
            f"{len(bad)} of {of} cannot be used; replace or remove them, or leave them out with {SKIP_BAD}\n{listing}"
        )
    log.warning("left out %d of %s that cannot be used, e.g.\n%s", len(bad), of, listing)


def _read(split: Split, indices: Numbers, what: str) -> _Readings:
    """What this rank has read of these images."""
    found = _Readings()
    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without the GIL
        own = _submitted(pool, split, indices)
        for index, reading in bar(own, f"checking {what} images", len(indices), unit="img"):
            found.add(index, reading)
    return found


def _submitted(pool: ThreadPoolExecutor, split: Split, indices: Numbers) -> Iterator[tuple[int, Future[_Reading]]]:
    """The index and the reading of each image that this rank reads, with a bounded number of them ahead."""

    def digest(index: int) -> _Reading:
        picture, found = split.images.load(split.rows[index], draft=1)
        mark = _mark(split.images.stamp(split.rows[index]))
        return _Reading(found, images.size_in_file(picture), images.dark(picture), mark)

    size = distributed.piece(len(indices), _CHUNK)
    for number in distributed.handed_out(-(-len(indices) // size)):
        chunk = indices[number * size : (number + 1) * size].tolist()
        yield from zip(chunk, [pool.submit(digest, index) for index in chunk], strict=True)


@dataclass
class Memory:
    """What was read of images before: their hashes and sizes, by what tells that they are still the same.

    path: the database. Where it may not be read, or not be written, that is said once, and it is gone without.
    """

    path: Path
    _readable: bool = field(default=True, init=False)
    _writable: bool = field(default=True, init=False)

    def recalled(self, marks: _Marks, decoding: Decoding) -> _Contents:
        """Hash and size of the images whose mark is remembered and whose size `decoding` accepts."""
        contents, accepts = _Contents.unknown(len(marks.values)), cache(partial(_accepts, decoding))
        if not self._readable or not marks.ends or not os.path.exists(self.path):  # noqa: PTH110 (Path's raises in a closed folder)
            return contents

        def read(connection: sqlite3.Connection) -> None:
            # One scan from the first path to the last: hundreds of thousands of single lookups take several times as
            # long. The types are asked for, since SQLite has neither checksums nor types of its columns.
            rows = connection.execute(
                f"SELECT * FROM verified WHERE path BETWEEN ? AND ? AND {_SOUND}", (*marks.ends, SIZE, _LARGEST)
            )
            while block := rows.fetchmany(_ROWS):
                block = [row for row in block if accepts(row[-2:])]
                images, which = marks.places(b"".join(_mark(Stamp(*row[:4])) for row in block))
                digests, sizes = np.frombuffer(b"".join(row[4] for row in block), np.uint8), [row[5:] for row in block]
                contents.put(images, digests.reshape(-1, SIZE)[which], np.array(sizes, np.int32).reshape(-1, 2)[which])

        self._use(read)
        return contents

    def remember(self, rows: Iterable[Remembered]) -> None:
        """Keep a row of each image: its stamp, hash, width and height."""
        rows, statement = iter(rows), "INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?, ?, ?, ?)"
        # In blocks: finding the next ones looks at their files, and nobody else can write meanwhile.
        while self._writable and (block := [*islice(rows, _ROWS)]):
            with contextlib.suppress(OSError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
            self._use(lambda connection: connection.executemany(statement, block), writing=True)

    def _use(self, use: Callable[[sqlite3.Connection], object], *, writing: bool = False) -> None:
        """Open the database for `use`. A damaged one is removed, since all it holds can be found again."""
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=30)) as connection, connection:
                connection.execute(f"CREATE TABLE IF NOT EXISTS verified ({', '.join(_COLUMNS)}, PRIMARY KEY (path))")
                if [row[1] for row in connection.execute("PRAGMA table_info(verified)")] != _COLUMNS:
                    raise sqlite3.DatabaseError("its table has other columns")
                use(connection)
        except sqlite3.OperationalError as error:  # in use, another user's, no such folder: it is only a memory
            without = "the next run reads the images again" if writing else "the images are read again"
            log.warning("%s cannot be %s (%s); %s", self.path, "written" if writing else "used", error, without)
            self._readable, self._writable = self._readable and writing, False
        except sqlite3.DatabaseError as error:
            log.warning("%s is damaged or another version's (%s); the images are read again", self.path, error)
            try:
                self.path.unlink()
            except OSError:
                self._readable = self._writable = False


def _accepts(decoding: Decoding, size: Size) -> bool:
    try:
        decoding.check(size, "")
    except ImageError:
        return False
    return True
