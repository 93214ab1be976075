"""The one room that knows what to do about bad images: every image is read once, before anything else.

What was read is remembered in a small database, so that a file whose size and times have not changed is not read
again. After this room a split holds good images only, each with the hash of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import logging
import os
import sqlite3
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from tl_trainer.config.data import SKIP_BAD, DataSection
from tl_trainer.data import images
from tl_trainer.data.dataset import Split, Stamp
from tl_trainer.data.images import DarkImages, Decoding, Size
from tl_trainer.errors import DataError, ImageError
from tl_trainer.ground import distributed
from tl_trainer.ground.machine import cores
from tl_trainer.ground.progress import bar

log = logging.getLogger(__name__)

_CHUNK = 500
_COLUMNS = [*Stamp._fields, "hash", "width", "height"]


class _Reading(NamedTuple):
    """An image's hash and size, what `images.dark` says of it, and what tells the file that was read from others."""

    digest: bytes
    size: tuple[int, int]
    largest: float
    file: int


@dataclass
class _Readings:
    """Readings of images by their indices, which rise, in few bytes each: a rank sends a million of them to another.

    bad: what is wrong with those that cannot be read.
    """

    numbers: array[int] = field(default_factory=lambda: array("q"))
    largest: array[float] = field(default_factory=lambda: array("d"))
    digests: bytearray = field(default_factory=bytearray)
    bad: dict[int, ImageError] = field(default_factory=dict)

    def add(self, index: int, reading: Future[_Reading]) -> None:
        """One more."""
        try:
            digest, size, largest, file = reading.result()
        except ImageError as error:
            error.__cause__ = error.__context__ = None  # what is kept of a million of them must not hold their frames
            self.bad[index] = error.with_traceback(None)
            return
        self.numbers.extend((index, *size, file))
        self.largest.append(largest)
        self.digests += digest

    def __iter__(self) -> Iterator[tuple[int, _Reading]]:
        numbers, size = self.numbers, hashlib.sha256().digest_size
        for row, largest in enumerate(self.largest):
            index, width, height, file = numbers[4 * row : 4 * row + 4]
            digest = bytes(self.digests[row * size : (row + 1) * size])
            yield index, _Reading(digest, (width, height), largest, file)


def _told(stamp: Stamp | None) -> int:
    """What tells a stamp from others, the same on all hosts."""
    return int.from_bytes(hashlib.blake2b(repr(stamp).encode(), digest_size=8).digest(), "little", signed=True)


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
    stamps = [split.images.stamp(row) for row in split.rows]
    # What rank 0 remembers holds for all, so that no other has to remember anything.
    known = distributed.from_first(lambda: memory.recalled(stamps, split.images.decoding) if memory else {})
    bad: dict[int, ImageError] = {}
    counted = dark or DarkImages()
    unread = [index for index in range(len(split)) if index not in known]
    of_ranks = distributed.together(lambda: _read(split, unread, what))
    for index, reading in heapq.merge(*of_ranks, key=lambda pair: pair[0]):
        known[index] = reading.digest, reading.size
        counted.add(split.name(index), reading.largest)
        # A dark image is named in every run. And a rank on another host may have read another file.
        if reading.largest or reading.file != _told(stamps[index]):
            stamps[index] = None
    for readings in of_ranks:
        bad |= readings.bad
    if memory and distributed.is_first():
        found = ((stamps[index], *known[index]) for index in unread if index in known)
        memory.remember((*stamp, digest, *size) for stamp, digest, size in found if stamp and stamp.settled)
    log.debug("%s images: %d read, %d unchanged since they were", what, len(unread), len(split) - len(unread))
    if dark is None:
        counted.warn(f"{len(split)} {what} images")
    good = [index for index in range(len(split)) if index not in bad]
    if bad:
        _report(bad, f"{len(split)} {what} images", data)
    if skipped is not None:
        skipped.update((split.name(index), str(bad[index])) for index in sorted(bad))
    if not good:
        raise DataError(f"none of the {len(split)} {what} images can be used")
    return _with_contents(split, good, known)


def remembered(split: Split, memory: Memory) -> Split:
    """Those of its images that were read before and are unchanged, with their hashes; none is read."""
    known = memory.recalled([split.images.stamp(row) for row in split.rows], split.images.decoding)
    return _with_contents(split, sorted(known), known)


def _with_contents(split: Split, indices: list[int], known: dict[int, tuple[bytes, tuple[int, int]]]) -> Split:
    hashes, sizes = [known[index][0] for index in indices], [known[index][1] for index in indices]
    return replace(split.subset(indices), hashes=hashes, sizes=sizes)


def _report(bad: dict[int, ImageError], of: str, data: DataSection) -> None:
    listing = "\n".join(str(bad[index]) for index in sorted(bad)[:2])
    if not data.skips_bad:
        raise DataError(
            f"{len(bad)} of {of} cannot be used; replace or remove them, or leave them out with {SKIP_BAD}\n{listing}"
        )
    log.warning("left out %d of %s that cannot be used, e.g.\n%s", len(bad), of, listing)


def _read(split: Split, indices: Sequence[int], what: str) -> _Readings:
    """What this rank has read of these images."""
    found = _Readings()
    with ThreadPoolExecutor(cores()) as pool:  # Pillow decodes without the GIL
        own = _submitted(pool, split, indices)
        for index, reading in bar(own, f"checking {what} images", len(indices), unit="img"):
            found.add(index, reading)
    return found


def _submitted(
    pool: ThreadPoolExecutor, split: Split, indices: Sequence[int]
) -> Iterator[tuple[int, Future[_Reading]]]:
    """The index and the reading of each image that this rank reads, with a bounded number of them ahead."""

    def digest(index: int) -> _Reading:
        picture, found = split.images.load(split.rows[index], draft=1)
        file = _told(split.images.stamp(split.rows[index]))
        return _Reading(found, images.size_in_file(picture), images.dark(picture), file)

    size = distributed.piece(len(indices), _CHUNK)
    for number in distributed.handed_out(-(-len(indices) // size)):
        chunk = indices[number * size : (number + 1) * size]
        yield from zip(chunk, [pool.submit(digest, index) for index in chunk], strict=True)


@dataclass
class Memory:
    """What was read of images before: their hashes and sizes, by what tells that they are still the same.

    path: the database. Where it may not be read, or not be written, that is said once, and it is gone without.
    """

    path: Path
    _readable: bool = field(default=True, init=False)
    _writable: bool = field(default=True, init=False)

    def recalled(self, stamps: Sequence[Stamp | None], decoding: Decoding) -> dict[int, tuple[bytes, tuple[int, int]]]:
        """Hash and size of the images whose stamp is remembered and whose size `decoding` accepts, by their index."""
        if not self._readable or not os.path.exists(self.path):  # noqa: PTH110 (Path's raises in a closed folder)
            return {}
        known: dict[bytes, tuple[bytes, tuple[int, int]]] = {}
        sizes: dict[tuple[int, int], tuple[int, int]] = {}  # one object for all images of a size, often most of them
        # By path: one that is there twice is one file. Should it have changed between two looks, its hash will say so.
        wanted = {stamp.path: stamp for stamp in stamps if stamp}
        ends = [end(wanted) for end in (min, max)] if wanted else [b"", b""]

        def read(connection: sqlite3.Connection) -> None:
            # One scan from the first path to the last: hundreds of thousands of single lookups take several times as
            # long. The types are asked for, since SQLite has neither checksums nor types of its columns.
            rows = connection.execute(
                "SELECT * FROM verified WHERE path BETWEEN ? AND ? AND typeof(hash) = 'blob' AND length(hash) = ? "
                "AND typeof(width) = 'integer' AND typeof(height) = 'integer'",
                (*ends, hashlib.sha256().digest_size),
            )
            for path, *times, digest, width, height in rows:
                if (stamp := wanted.get(path)) and stamp == (path, *times):
                    known[stamp.path] = digest, sizes.setdefault((width, height), (width, height))

        self._use(read)
        accepted = {size for size in sizes if _accepts(decoding, size)}
        found = ((index, known[stamp.path]) for index, stamp in enumerate(stamps) if stamp and stamp.path in known)
        return {index: (digest, size) for index, (digest, size) in found if size in accepted}

    def remember(self, rows: Iterable[tuple[bytes, int, int, int, bytes, int, int]]) -> None:
        """Keep a row of each image: its stamp, hash, width and height."""
        first = next(rows := iter(rows), None)
        if first is None or not self._writable:
            return
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        statement = "INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?, ?, ?, ?)"
        self._use(lambda connection: connection.executemany(statement, chain([first], rows)), writing=True)

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
