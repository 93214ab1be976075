"""Tar archives: where their files are, by the headers, which the standard library's tarfile reads."""

from __future__ import annotations

import logging
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from tl_trainer.data import images
from tl_trainer.errors import DataError, ImageError
from tl_trainer.ground.wording import printable

log = logging.getLogger(__name__)

REST = "(the rest)"
NO_SENSE = (tarfile.TarError, ValueError, OverflowError, RecursionError)  # what tarfile says of headers without any
LONGEST_HEADER = 1 << 20  # bytes of a name or of pax records: of a forged size nothing is read


@dataclass(frozen=True)
class Member:
    """A file in a tar archive, and where its bytes are."""

    archive: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def content(self) -> bytes:
        """Its bytes. Raises ImageError where they are not all there."""
        if not self.size:
            raise ImageError(f"{printable(str(self))}: empty file (0 bytes); replace or remove it")
        data = images.read(self.archive, self.offset, self.size) if self.size > 0 else b""
        if self.size < 0 or len(data) < self.size:
            byte = self.offset + len(data)
            raise ImageError(
                f"{printable(str(self))}: {self.archive} cannot be read from byte {byte:,} on; fetch or write it again"
            )
        return data


class _Headers:
    """An open archive for tarfile, which would take memory for as many bytes as a header says that it has."""

    def __init__(self, file: IO[bytes]) -> None:
        self.seek, self.tell, self._read = file.seek, file.tell, file.read

    def read(self, size: int) -> bytes:
        if size > LONGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size:,} bytes")
        return self._read(size)


def members(file: IO[bytes], archive: Path) -> Iterator[Member]:
    """The files in an open tar archive, in order, by their headers; who takes them may move `file`.

    Of an archive that is cut or damaged the last one has a size of -1, and its offset is the byte from which on nothing
    can be read. Raises DataError for what is no tar archive.
    """
    length = file.seek(0, 2)
    file.seek(0)
    try:
        headers: Any = _Headers(file)  # which has all that is asked for
        tar = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115  (closed below)
    except NO_SENSE as error:  # of the first header
        reason = "compressed; unpack it, since images are read by seeking" if _is_compressed(file) else str(error)
        raise DataError(f"{archive}: not a tar archive, or one cut at byte {length:,}: {reason}") from None
    with tar:
        try:
            while (entry := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep each
                if entry.size < 0:  # of a forged header; tarfile would go back, without an end
                    yield Member(archive, REST, entry.offset, -1)
                    return
                if entry.offset_data + entry.size > length:
                    yield Member(archive, entry.name, length, -1)
                    return
                if entry.isreg() and not entry.issparse():
                    yield Member(archive, entry.name, entry.offset_data, entry.size)
        except NO_SENSE:
            log.debug("%s: damaged at byte %d", archive, tar.offset)
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # what an archive ends with
            yield Member(archive, REST, min(tar.offset, length), -1)


def _is_compressed(file: IO[bytes]) -> bool:
    file.seek(0)
    return file.read(6).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd"))


def images_in(archive: Path) -> Iterator[Member]:
    """The images in a tar archive, by their endings; of one that is cut or none at all, the last one is unreadable."""
    with archive.open("rb") as file:
        try:
            for member in members(file, archive):
                if member.size < 0 or Path(member.name).suffix.lower() in images.ENDINGS:
                    yield member
        except DataError:  # to be said where it is read
            yield Member(archive, REST, 0, -1)
