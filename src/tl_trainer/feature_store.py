"""Feature rows on disk, by key: append-only, memory-mapped, safe against kills, torn writes and flipped bits.

A store is a folder with one shape and one precision. Every process that computes rows appends them to a segment of its
own, a file of raw rows and a file of records (key, checksum of the row, checksum of the record), in the same order and
the row first. So nobody waits for a lock, two processes can fill one store at once, and a row without a whole record
does not exist.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tl_trainer.errors import RunError
from tl_trainer.files import write_text

log = logging.getLogger(__name__)

KEY_BYTES = 32
_RECORD = np.dtype([("key", f"V{KEY_BYTES}"), ("row_sum", "<u4"), ("record_sum", "<u4")])
_CHECKED_BYTES = KEY_BYTES + 4


class FeatureStore:
    """The rows in `folder`. `find` says which keys are there, `append` adds rows, `take` reads them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index: dict[bytes, tuple[int, int]] = {}
        self.segments: list[np.ndarray[Any, Any]] = []
        self.checksums: list[np.ndarray[Any, Any]] = []
        self.shape: tuple[int, ...] = ()
        self.dtype = torch.float32
        self._writer: _Segment | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def refresh(self) -> None:
        """Read what is there now, leaving out, with a warning, what is damaged."""
        self.index, self.segments, self.checksums = {}, [], []
        if not self._read_description():
            return
        for path in sorted(self.folder.glob("*.keys")):
            self._read_segment(path)

    def find(self, keys: Iterable[bytes]) -> list[bytes]:
        """Those of the keys that are not there, or whose row does not have its checksum any more; each once."""
        missing, damaged = dict.fromkeys(key for key in keys if key not in self.index), 0
        for key in keys:
            if key in self.index and not self._intact(key):
                del self.index[key]
                missing[key] = None
                damaged += 1
        if damaged:
            log.warning("%d cached features in %s are damaged and are computed again", damaged, self.folder)
        return list(missing)

    def append(self, keys: Sequence[bytes], rows: Tensor) -> None:
        """Add rows (N, ...) under their keys. Raises RunError where the disk is full."""
        if not self.shape:
            self.shape, self.dtype = tuple(rows.shape[1:]), rows.dtype
            description = {"shape": self.shape, "dtype": str(self.dtype).removeprefix("torch.")}
            write_text(self.folder / "store.json", json.dumps(description))
        try:
            self._writer = self._writer or _Segment(self.folder)
            self._writer.append(keys, _as_numbers(rows))
        except OSError as error:
            raise RunError(
                f"cannot write features to {self.folder}: {error.strerror}; free some space or set features.dir"
            ) from error

    def close(self) -> None:
        """End this process's segment, if it wrote one, and read everything again."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self.refresh()

    def take(self, keys: Sequence[bytes]) -> Tensor:
        """The rows of the keys, in their order, as one tensor (N, ...)."""
        places = np.array([self.index[key] for key in keys])
        numbers = np.empty((len(keys), self._row_numbers), dtype=self._number)
        for segment in np.unique(places[:, 0]):
            chosen = places[:, 0] == segment
            numbers[chosen] = self.segments[segment][places[chosen, 1]]
        return torch.from_numpy(numbers).view(self.dtype).view(len(keys), *self.shape)

    @property
    def row_bytes(self) -> int:
        """The size of one row."""
        return self._row_numbers * self._number.itemsize

    @property
    def _number(self) -> np.dtype[Any]:
        return np.dtype(np.uint32 if self.dtype == torch.float32 else np.uint16)  # numpy has no bf16: bits are enough

    @property
    def _row_numbers(self) -> int:
        return int(np.prod(self.shape))

    def _read_description(self) -> bool:
        path = self.folder / "store.json"
        if not path.exists():
            return False
        try:
            description = json.loads(path.read_text(encoding="utf-8"))
            self.shape = tuple(int(size) for size in description["shape"])
            self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[
                description["dtype"]
            ]
        except (ValueError, KeyError, TypeError):
            log.warning("%s is damaged; its features are computed again", path)
            for file in self.folder.iterdir():
                file.unlink()
            self.shape = ()
            return False
        return True

    def _read_segment(self, path: Path) -> None:
        records = np.fromfile(path, dtype=_RECORD, count=path.stat().st_size // _RECORD.itemsize)
        rows_path = path.with_suffix(".rows")
        there = rows_path.stat().st_size // self.row_bytes if rows_path.exists() else 0
        if there < len(records):
            log.warning("%s is cut off; %d features are computed again", rows_path, len(records) - there)
            records = records[:there]
        if not len(records):
            return
        rows = np.memmap(rows_path, dtype=self._number, mode="r", shape=(len(records), self._row_numbers))
        raw, damaged = records.tobytes(), 0
        for number, record in enumerate(records):
            start = number * _RECORD.itemsize
            if zlib.crc32(raw[start : start + _CHECKED_BYTES]) != record["record_sum"]:
                damaged += 1
                continue
            self.index[raw[start : start + KEY_BYTES]] = (len(self.segments), number)
        if damaged:
            log.warning("%s has %d damaged records; their features are computed again", path, damaged)
        self.segments.append(rows)
        self.checksums.append(records["row_sum"])

    def _intact(self, key: bytes) -> bool:
        segment, number = self.index[key]
        return zlib.crc32(self.segments[segment][number].data) == int(self.checksums[segment][number])


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
        self.rows.close()
        self.keys.close()


def _as_numbers(rows: Tensor) -> np.ndarray[Any, Any]:
    flat = rows.detach().cpu().contiguous().flatten(1)
    bits = torch.int32 if flat.dtype == torch.float32 else torch.int16
    return flat.view(bits).numpy()


def folder_size(folder: Path) -> int:
    """The bytes of all files below a folder; 0 where it does not exist."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def clear(root: Path) -> int:
    """Remove all stores under `root`, and nothing else that may lie there; the bytes they had."""
    size = 0
    for store in _stores(root):
        size += folder_size(store)
        shutil.rmtree(store)
    return size


def make_room(root: Path, needed: int, limit: int, keep: Path) -> None:
    """Remove the stores under `root` that were not used for longest until `needed` more bytes stay within `limit`."""
    total = folder_size(root)
    for store in sorted(_stores(root), key=lambda store: store.stat().st_mtime):
        if total + needed <= limit:
            return
        if store != keep:
            log.info("removing cached features that were not used lately: %s", store)
            total -= folder_size(store)
            shutil.rmtree(store, ignore_errors=True)


def _stores(root: Path) -> list[Path]:
    """The folders that can only be stores: the cache may have been put into a folder with other things."""
    return [path for path in root.glob("*") if path.is_dir() and re.fullmatch(r"[0-9a-f]{32}", path.name)]
