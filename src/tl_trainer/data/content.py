"""Images by what is in them: content hashes, remembered for files whose size and time have not changed."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

from tl_trainer.data import images
from tl_trainer.data.dataset import Split
from tl_trainer.errors import ImageError

log = logging.getLogger(__name__)

# A file that was written this recently may be written again within the resolution of its time stamp.
SETTLED_SECONDS = 2.0
_CHUNK = 500

Stamp = tuple[int, int]


def content_hashes(split: Split, memory: Path, pool: Executor) -> list[bytes | ImageError]:
    """The SHA-256 of each image's file (of its pixels where it is no file), or why it cannot be read.

    `memory` is a small database of what was hashed before. A file with the same size and modification time is not read
    again; a file that was touched is read and found to be the same.
    """
    if split.paths is None:
        return list(pool.map(lambda index: _pixel_hash(split, index), range(len(split))))
    paths = [_key(path) for path in split.paths]
    known = _recall(memory, paths)
    stamps = [_stamp(path) for path in split.paths]
    remembered = [known.get(key, (None, None)) for key in paths]
    hashes = list(pool.map(_file_hash, split.paths, stamps, remembered))
    settled = time.time_ns() - int(SETTLED_SECONDS * 1e9)
    _remember(
        memory,
        [
            (path, *stamp, digest)
            for path, stamp, digest in zip(paths, stamps, hashes, strict=True)
            if stamp and isinstance(digest, bytes) and known.get(path) != (stamp, digest) and stamp[1] < settled
        ],
    )
    for index, before in enumerate(split.digests):
        if isinstance(hashes[index], bytes) and hashes[index] != before:
            hashes[index] = images.changed(split.paths[index])
    return hashes


def contents(split: Split, memory: Path | None) -> list[str]:
    """What tells the readable images of a split from others: 64 bits of each one's content hash, in hexadecimal."""
    if split.digests:
        return [digest.hex()[:16] for digest in split.digests]
    with ThreadPoolExecutor() as pool:
        hashes = content_hashes(split, memory or Path(":memory:"), pool)
    return [digest.hex()[:16] for digest in hashes if isinstance(digest, bytes)]


def forget(split: Split, indices: Iterable[int], memory: Path) -> None:
    """Have these images read again the next time, whatever their size and modification time."""
    paths = split.paths or ()
    if rows := [(_key(paths[index]),) for index in indices if paths]:
        _with_database(memory, lambda connection: connection.executemany("DELETE FROM files WHERE path = ?", rows))


def _pixel_hash(split: Split, index: int) -> bytes:
    picture = split.open(index)
    return hashlib.sha256(repr(picture.size).encode() + picture.tobytes()).digest()


def _key(path: Path) -> bytes:
    """What a file is called in the database: its name may be no text."""
    return os.fsencode(path.absolute())


def _file_hash(
    path: Path, stamp: Stamp | None, remembered: tuple[Stamp, bytes] | tuple[None, None]
) -> bytes | ImageError:
    if remembered[1] is not None and remembered[0] == stamp:
        return remembered[1]
    try:
        return hashlib.sha256(images.read(path)).digest()
    except ImageError as error:
        return error


def _stamp(path: Path) -> Stamp | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _with_database(memory: Path, use: Callable[[sqlite3.Connection], object]) -> None:
    """Open the database for `use`. A damaged one is removed, since all it holds can be found again."""
    try:
        with contextlib.closing(sqlite3.connect(memory, timeout=30)) as connection, connection:
            connection.execute("CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, size, time, hash)")
            use(connection)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):  # another run has it, and it is only a memory
            log.warning("%s is in use; going on without it", memory)
            return
        log.warning("%s is damaged (%s); the images are hashed again", memory, error)
        with contextlib.suppress(OSError):
            memory.unlink()


def _recall(memory: Path, paths: list[bytes]) -> dict[bytes, tuple[Stamp, bytes]]:
    known: dict[bytes, tuple[Stamp, bytes]] = {}

    def read(connection: sqlite3.Connection) -> None:
        for first in range(0, len(paths), _CHUNK):
            chunk = paths[first : first + _CHUNK]
            marks = ",".join("?" * len(chunk))
            query = f"SELECT path, size, time, hash FROM files WHERE path IN ({marks})"
            known.update(
                (path, ((size, when), digest))
                for path, size, when, digest in connection.execute(query, chunk)
                if isinstance(digest, bytes) and len(digest) == hashlib.sha256().digest_size  # SQLite has no checksums
            )

    _with_database(memory, read)
    return known


def _remember(memory: Path, rows: list[tuple[bytes, int, int, bytes]]) -> None:
    if rows:
        statement = "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?)"
        _with_database(memory, lambda connection: connection.executemany(statement, rows))
