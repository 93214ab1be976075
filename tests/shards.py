"""Tar archives made on the spot, for the tests of what reads them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from pathlib import Path

from PIL import Image


def write_tar(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """An archive with these members, in order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return path


def picture(number: int = 0, size: tuple[int, int] = (8, 8)) -> bytes:
    """A small PNG file, another one for each number."""
    file = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256 % 256, 0)).save(file, "PNG")
    return file.getvalue()


def samples(count: int, labels: str = "ab", first: int = 0) -> dict[str, bytes | str]:
    """The members of `count` samples whose labels take turns."""
    found: dict[str, bytes | str] = {}
    for number in range(first, first + count):
        found |= {f"{number:04}.png": picture(number), f"{number:04}.cls": labels[number % len(labels)]}
    return found
