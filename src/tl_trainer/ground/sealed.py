"""Plain data and tensors in a file with a checksum over the whole of it, read without ever running code from it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import stat
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from tl_trainer.errors import CheckpointError, RunError
from tl_trainer.ground.files import write_atomically
from tl_trainer.ground.machine import is_out_of_memory

# A checkpoint ends with this and the SHA-256 of all bytes before: torch's own checksums are not read when the file is
# memory-mapped, and none covers its headers. torch.load does not mind what follows the end of its archive.
_SEAL = b"tl-sha256:"
_SEAL_BYTES = len(_SEAL) + 32


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


def seal_of(path: Path) -> str:
    """The checksum that `save_sealed` wrote, in hexadecimal: it tells this file from every other one."""
    with _named(path), path.open("rb") as file:
        file.seek(-hashlib.sha256().digest_size, os.SEEK_END)
        return file.read().hex()


def load_plain(path: Path, *, mapped: bool = True) -> Any:
    """What torch.save wrote to `path`; never runs code from the file.

    mapped: whether tensors are memory-mapped, where the format allows it. Raises CheckpointError where the file is
    missing, damaged, or holds anything but plain data and tensors, RunError where memory runs out.
    """
    import torch  # here, so that a command's --help does not wait for it

    with _named(path):
        path.open("rb").close()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's remarks on a file that is about to be refused
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped and zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "Unsupported operand" not in str(error):  # that is a byte which is no pickle at all
            raise CheckpointError(
                f"{path}: refused: it holds more than plain data and tensors, which could run code when loaded; "
                "of a pickled model save the tensors: torch.save(model.state_dict(), 'weights.pth')"
            ) from error
        raise CheckpointError(f"{path}: damaged or not a PyTorch file") from error
    except Exception as error:  # torch's readers raise anything on broken bytes, OSError to KeyError
        if is_out_of_memory(error):  # which is no reason to go on from another file
            raise RunError(
                f"{path}: out of memory while it was read; close other programs, or replace it if it may be forged"
            ) from error
        raise CheckpointError(f"{path}: damaged or not a PyTorch file") from error


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turn the operating system's reason why a file cannot be read into a CheckpointError."""
    try:
        if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
            raise CheckpointError(f"{path}: not an ordinary file")
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
