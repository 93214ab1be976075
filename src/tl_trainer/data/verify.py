"""The one room that knows what to do about bad images: every image is read once, before anything else.

What was read is remembered in a small database, so that a file whose size and times have not changed is not read
again. After this room a split holds good images only, each with the hash of its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from tl_trainer.config.schema import DataSection
from tl_trainer.data import images
from tl_trainer.data.dataset import Split, Stamp
from tl_trainer.data.images import DarkImages
from tl_trainer.errors import DataError, ImageError
from tl_trainer.ground.machine import cores
from tl_trainer.ground.progress import bar

log = logging.getLogger(__name__)

# A file that was written this recently may be written again within the resolution of its time stamp.
SETTLED_SECONDS = 2.0
_CHUNK = 500


def verified(split: Split, what: str, data: DataSection, memory: Path | None, dark: DarkImages | None = None) -> Split:
    """The split with the content hash of each image, and without those that cannot be read.

    what: what messages call the split. data: says what to do with bad images. memory: the database, None for none.
    dark: where dark images are counted, to be named with those of other splits; None: they are named here.
    Raises DataError, naming two of them, for bad images that are not to be skipped, and where no image is left.
    """
    stamps = [split.images.stamp(row) for row in split.rows]
    hashes: dict[int, bytes] = _recalled(memory, stamps)
    bad: dict[int, ImageError] = {}
    counted = dark or DarkImages()
    unread = [index for index in range(len(split)) if index not in hashes]
    for index, reading in bar(_read(split, unread), f"checking {what} images", len(unread), unit="img"):
        try:
            hashes[index], largest = reading.result()
        except ImageError as error:
            bad[index] = error
        else:
            counted.add(split.name(index), largest)
            if largest:  # is not remembered, so that it is named in every run
                stamps[index] = None
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    found = [(stamps[index], hashes[index]) for index in unread if index in hashes]
    _remember(memory, [(*stamp, digest) for stamp, digest in found if stamp and stamp.modified < settled])
    log.debug("%s images: %d read, %d unchanged since they were", what, len(unread), len(split) - len(unread))
    if dark is None:
        counted.warn(f"{len(split)} {what} images")
    good = [index for index in range(len(split)) if index not in bad]
    if bad:
        _report(bad, f"{len(split)} {what} images", data)
    if not good:
        raise DataError(f"none of the {len(split)} {what} images can be read")
    return replace(split.subset(good), hashes=[hashes[index] for index in good])


def _report(bad: dict[int, ImageError], of: str, data: DataSection) -> None:
    listing = "\n".join(str(bad[index]) for index in sorted(bad)[:2])
    if data.on_bad_image == "error":
        raise DataError(
            f"{len(bad)} of {of} cannot be used; replace or remove them, or set data.on_bad_image: skip "
            f"(tl-eval: --on-bad-image skip)\n{listing}"
        )
    log.warning("skipped %d of %s that cannot be read, e.g.\n%s", len(bad), of, listing)


def _read(split: Split, indices: Sequence[int]) -> Iterator[tuple[int, Future[tuple[bytes, float]]]]:
    """Each image's index and its reading, with a bounded number of them ahead. Pillow decodes without the GIL.

    A reading is the hash of the image's content, and what `images.dark` says of it.
    """

    def digest(index: int) -> tuple[bytes, float]:
        picture, found = split.images.load(split.rows[index], draft=1)
        return found, images.dark(picture)

    with ThreadPoolExecutor(cores()) as pool:
        for first in range(0, len(indices), _CHUNK):
            chunk = indices[first : first + _CHUNK]
            yield from zip(chunk, [pool.submit(digest, index) for index in chunk], strict=True)


def _with_database(memory: Path, use: Callable[[sqlite3.Connection], object]) -> None:
    """Open the database for `use`. A damaged one is removed, since all it holds can be found again."""
    try:
        with contextlib.closing(sqlite3.connect(memory, timeout=30)) as connection, connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS verified (path BLOB PRIMARY KEY, size, modified, changed, hash)"
            )
            if [row[1] for row in connection.execute("PRAGMA table_info(verified)")] != [*Stamp._fields, "hash"]:
                raise sqlite3.DatabaseError("its table has other columns")
            use(connection)
    except sqlite3.OperationalError as error:  # in use, read-only, no such folder: it is only a memory
        log.warning("%s cannot be used (%s); going on without it", memory, error)
    except sqlite3.DatabaseError as error:
        log.warning("%s is damaged (%s); the images are read again", memory, error)
        with contextlib.suppress(OSError):
            memory.unlink()


def _recalled(memory: Path | None, stamps: Sequence[Stamp | None]) -> dict[int, bytes]:
    """The hashes of the images whose stamp is remembered, by their index."""
    if memory is None or not memory.is_file():
        return {}
    known: dict[tuple[Any, ...], bytes] = {}
    wanted = {stamp for stamp in stamps if stamp}
    ends = [end(stamp.path for stamp in wanted) for end in (min, max)] if wanted else [b"", b""]

    def read(connection: sqlite3.Connection) -> None:
        # One scan from the first path to the last: hundreds of thousands of single lookups take several times as long.
        rows = connection.execute("SELECT * FROM verified WHERE path BETWEEN ? AND ?", ends)
        known.update((row[:-1], row[-1]) for row in rows if row[:-1] in wanted)

    _with_database(memory, read)
    size = hashlib.sha256().digest_size  # SQLite has no checksums
    found = {index: known[stamp] for index, stamp in enumerate(stamps) if stamp in known}
    return {index: digest for index, digest in found.items() if isinstance(digest, bytes) and len(digest) == size}


def _remember(memory: Path | None, rows: list[tuple[bytes, int, int, int, bytes]]) -> None:
    if memory is None or not rows:
        return
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
    statement = "INSERT OR REPLACE INTO verified VALUES (?, ?, ?, ?, ?)"
    _with_database(memory, lambda connection: connection.executemany(statement, rows))
