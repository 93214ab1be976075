"""Files on disk: atomic writes, content hashes, the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pickle
import shutil
import socket
import stat
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tl_trainer.errors import CheckpointError, InputError, RunError, is_out_of_memory

log = logging.getLogger(__name__)

STALL_SECONDS = 25

# A checkpoint ends with this and the SHA-256 of all bytes before: torch's own checksums are not read when the file is
# memory-mapped, and none covers its headers. torch.load does not mind what follows the end of its archive.
_SEAL = b"tl-sha256:"
_SEAL_BYTES = len(_SEAL) + 32


def write_atomically(path: Path, write: Callable[[IO[bytes]], None]) -> None:
    """Replace `path` by what `write` puts into the file it is given, wholly or not at all.

    The order is fsync(file) < rename < fsync(folder), so that after a power cut either the old or the new content is
    there. Raises RunError, with the old file untouched and no temporary file left, where the disk is full.
    """
    temporary = path.with_name(f".{path.name}-{os.getpid()}.tmp")
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


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, atomically."""

    def write(file: IO[bytes]) -> None:
        file.write(data)

    write_atomically(path, write)


class _Sealed:
    """A file that hashes what is written to it, for torch.save."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest = file, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def save_sealed(path: Path, content: Any) -> None:
    """Replace `path` by plain data and tensors with a checksum over the whole file, atomically."""
    import torch

    def write(file: IO[bytes]) -> None:
        sealed = _Sealed(file)
        try:
            torch.save(content, sealed)  # type: ignore[arg-type]  # it asks for no more
        except RuntimeError as error:  # torch's words for a full disk, where its archive was not closed
            raise sealed.error or error from None
        file.write(_SEAL + sealed.digest.digest())

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


def check_seal(path: Path) -> bool:
    """Whether `save_sealed` wrote the file. Raises CheckpointError where it did, and a bit is not as it was."""
    with _named(path), path.open("rb") as file:
        size = file.seek(0, os.SEEK_END) - _SEAL_BYTES
        file.seek(max(0, size))
        if file.read(len(_SEAL)) != _SEAL:
            return False
        expected, digest = file.read(), hashlib.sha256()
        file.seek(0)
        while size and (block := file.read(min(size, 1 << 20))):
            digest.update(block)
            size -= len(block)
    if digest.digest() != expected:
        raise CheckpointError(f"{path}: damaged: its checksum is wrong")
    return True


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the operating system's reason why a file cannot be read into a CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise CheckpointError(f"{path}: not an ordinary file")
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error


_held: set[int] = set()


def _let_go() -> None:
    """In a forked process: a loader's worker may outlive the run that was killed, and must not hold its folder."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def sole_use(folder: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a folder for this process; where another one holds it, `wait` for that or raise InputError.

    Gives whether it is held: Windows and some file systems have no such lock.
    """
    try:
        import fcntl
    except ImportError:
        yield False
        return
    descriptor, held = os.open(folder, os.O_RDONLY), True
    _held.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise InputError(f"{folder}: another tl-train is at work in it; wait for it, or end it first") from None
            log.info("waiting for another process that is at work in %s", folder)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            log.debug("%s cannot be locked", folder)
            held = False
        yield held
    finally:
        if descriptor in _held:  # not in a worker, where the generator may end too
            _held.remove(descriptor)
            os.close(descriptor)


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


def load_plain(path: Path) -> Any:
    """What torch.save wrote to `path`, memory-mapped where the format allows it; never runs code from the file.

    Raises CheckpointError where the file is missing, damaged, or holds anything but plain data and tensors, RunError
    where memory runs out.
    """
    import torch  # here, so that a command's --help does not wait for it

    with _named(path):
        path.open("rb").close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on a file that is about to be refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):  # that is a byte which is no pickle at all
            raise CheckpointError(
                f"{path}: refused: it holds more than plain data and tensors, which could run code when loaded"
            ) from error
        raise CheckpointError(f"{path}: damaged or not a PyTorch file") from error
    except Exception as error:  # torch's readers raise anything on broken bytes, OSError to KeyError
        if is_out_of_memory(error):  # which is no reason to go on from another file
            raise RunError(
                f"{path}: out of memory while it was read; close other programs, or replace it if it may be forged"
            ) from error
        raise CheckpointError(f"{path}: damaged or not a PyTorch file") from error


@contextlib.contextmanager
def stall_timeout() -> Iterator[None]:
    """Within the block a download that stands still ends; torch's and torchvision's have no limit of their own."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(STALL_SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


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


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows has no handle on a folder to sync
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
