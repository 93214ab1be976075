"""The folders of feature stores: what describes one, how large they are, and which are removed to make room."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)

# What a store's files are called; nothing else in its folder is ever removed.
_OWN = re.compile(r"[0-9a-f]{32}\.(rows|keys)|store\.json|\.store\.json-\d+\.tmp")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def description_of(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """What store.json holds."""
    description = {"shape": list(shape), "dtype": str(dtype).removeprefix("torch.")}
    return {**description, "checksum": zlib.crc32(json.dumps(description).encode())}


def folder_size(folder: Path) -> int:
    """The bytes of all files below a folder; 0 where it does not exist."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # temporary files of other runs come and go
            total += path.stat().st_size if path.is_file() else 0
    return total


def clear(root: Path) -> int:
    """Remove all stores under `root`, and nothing else that may lie there; the bytes they had."""
    return sum(remove(store) for store in _stores(root))


def make_room(root: Path, needed: int, limit: int, keep: Collection[Path]) -> None:
    """Remove the stores under `root` that were not used for longest until `needed` more bytes stay within `limit`."""
    total = folder_size(root)
    for store in sorted(_stores(root), key=_last_used):
        if total + needed <= limit:
            return
        if store not in keep:
            log.info("removing cached features that were not used lately: %s", store)
            total -= remove(store)


def _last_used(store: Path) -> float:
    with contextlib.suppress(FileNotFoundError):  # another run removes it at the same time
        return store.stat().st_mtime
    return 0.0


def _stores(root: Path) -> list[Path]:
    """The folders that are stores: called as one, and with a description that has its checksum. The cache may have been
    put into a folder with other things, or its folder may have been named by somebody else."""
    named = (path for path in root.glob("*") if re.fullmatch(r"[0-9a-f]{32}", path.name) and not path.is_symlink())
    return [path for path in named if path.is_dir() and description_in(path / "store.json") is not None]


def description_in(path: Path) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and precision as `append` wrote them; None for anything else."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        shape, dtype = tuple(description["shape"]), _DTYPES[description["dtype"]]
        return (shape, dtype) if description == description_of(shape, dtype) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def remove(store: Path) -> int:
    """Remove the files that a store consists of, and its folder where nothing else is in it; the bytes they had."""
    size = 0
    for path in store.iterdir():
        if _OWN.fullmatch(path.name) and not path.is_symlink():
            with contextlib.suppress(OSError):  # another run removes it too
                found = path.stat().st_size
                path.unlink()
                size += found
    with contextlib.suppress(OSError):
        store.rmdir()
    return size
