"""Files on disk: atomic writes, CSV, what is kept of before, folders that can be written to, the cache folder."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import os
import shutil
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterable
from itertools import count
from pathlib import Path
from typing import IO

from tl_trainer.errors import InputError, RunError


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Replace `path` by what `write` puts into the file it is given, wholly or not at all.

    The order is fsync(file) < rename < fsync(folder), so that after a power cut either the old or the new content is
    there. Raises RunError, with the old file untouched and no temporary file left, where the disk is full.
    """
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex}.tmp")  # hosts that share a folder share pids too
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # the folder may be what is missing
            temporary.unlink()
        if isinstance(error, OSError):
            raise RunError(f"cannot write {path}: {error.strerror or error}") from error
        if isinstance(error, RuntimeError) and "PytorchStreamWriter" in str(error):  # torch.save on a full disk
            raise RunError(f"cannot write {path}: the disk is full or a quota is used up") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, atomically."""
    write_bytes(path, text.encode("utf-8", "surrogateescape"))  # a file name may be any bytes


def csv_text(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """A table as CSV."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return table.getvalue()


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically."""

    def write(file: IO[bytes]) -> None:
        file.write(data)

    write_atomically(path, write)


def previous(path: Path) -> Path:
    """Where `keep_previous` keeps what was in `path` before."""
    return path.with_name(f".{path.stem}.previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Keep what is in `path`, if anything, before it is replaced; at no moment is there neither of the two."""
    spare = previous(path).with_suffix(".tmp")
    try:
        spare.unlink(missing_ok=True)
        if path.is_file():
            try:
                os.link(path, spare)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, spare)
            spare.replace(previous(path))
    except OSError as error:
        with contextlib.suppress(OSError):
            spare.unlink(missing_ok=True)
        raise RunError(f"cannot write {spare}: {error.strerror}") from error


def remove_unfinished(*folders: Path) -> None:
    """Remove what a killed process has half written into folders that this one holds."""
    for unfinished in (path for folder in folders for path in folder.glob(".*.tmp")):
        unfinished.unlink(missing_ok=True)


def content_hash(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_folder() -> Path:
    """The folder for what can be made again: $TL_CACHE, else `tl-trainer` in the platform's cache folder."""
    if given := os.environ.get("TL_CACHE"):
        return Path(given).expanduser()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "tl-trainer"


def make_folder(path: Path, key: str) -> None:
    """Create a folder that will be written to; InputError, naming the setting `key`, where that cannot work."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {path}: {error.strerror}; choose another folder with {key}") from error


def numbered_folder(parent: Path, name: str) -> Path:
    """A new folder in `parent`, called `name` and the first number that is free."""
    for number in count(1):
        with contextlib.suppress(FileExistsError):
            (parent / f"{name}-{number}").mkdir()
            return parent / f"{name}-{number}"
    raise AssertionError("count() does not end")


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to sync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
