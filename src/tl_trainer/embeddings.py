"""The features of images as a table: Parquet for any number of them, .npz for as many as memory holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tl_trainer.errors import InputError, RunError
from tl_trainer.ground.files import make_folder
from tl_trainer.predict import Row

GROUP = 1024  # rows that are written at once

Write = Callable[[Sequence[Row]], None]


def check(out: Path, *, force: bool) -> None:
    """Raise InputError, before any image is read, for a file that cannot be written so."""
    if out.suffix not in WRITERS:
        raise InputError(f"--embed {out}: the name must end with {' or '.join(WRITERS)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise InputError("--embed needs pyarrow for .parquet; run: pip install pyarrow, or write .npz")
    if out.is_dir() or (out.exists() and not force):
        more = "" if out.is_dir() else ", or replace it with --force"
        raise InputError(f"--embed {out} exists; choose another name{more}")
    make_folder(out.parent, "--embed")


def written(rows: Iterator[Row], out: Path, width: int) -> Iterator[Row]:
    """Pass the rows on, and put path and features (width,) of each image without an error into `out`.

    The file is there when the last row has been taken, and not at all where they end before. Raises RunError where it
    cannot be written.
    """
    unfinished = out.with_name(f".{out.name}-{os.getpid()}.tmp")
    try:
        with WRITERS[out.suffix](unfinished, width) as write:
            group: list[Row] = []
            for row in rows:
                if row.features is not None:
                    group.append(row)
                if len(group) == GROUP:
                    write(group)
                    group = []
                yield row
            write(group)
        unfinished.replace(out)
    except OSError as error:
        raise RunError(f"cannot write {out}: {error.strerror or error}") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _parquet(path: Path, width: int) -> Iterator[Write]:
    """Columns `path` and `features`, a list of `width` float32; a row group for each GROUP images."""
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema({"path": pyarrow.string(), "features": pyarrow.list_(pyarrow.float32(), width)})
    with parquet.ParquetWriter(path, schema) as file:

        def write(rows: Sequence[Row]) -> None:
            values = pyarrow.array(_matrix(rows, width).ravel())
            # A file's name may be any bytes, and Arrow's strings are UTF-8.
            paths = [row.path.encode("utf-8", "backslashreplace").decode() for row in rows]
            features = pyarrow.FixedSizeListArray.from_arrays(values, width)
            file.write_table(pyarrow.table([pyarrow.array(paths, pyarrow.string()), features], schema=schema))

        yield write


@contextmanager
def _npz(path: Path, width: int) -> Iterator[Write]:
    """Arrays `path` (N,) and `features` (N, width) float32, which are kept until the end."""
    paths: list[str] = []
    features = [np.empty((0, width), np.float32)]

    def write(rows: Sequence[Row]) -> None:
        paths.extend(row.path for row in rows)
        features.append(_matrix(rows, width))

    yield write
    with path.open("wb") as file:
        np.savez(file, path=np.array(paths, np.str_), features=np.concatenate(features))


def _matrix(rows: Sequence[Row], width: int) -> np.ndarray[Any, Any]:
    found = [row.features for row in rows if row.features is not None]
    return torch.stack(found).numpy() if found else np.empty((0, width), np.float32)


WRITERS: dict[str, Callable[[Path, int], AbstractContextManager[Write]]] = {".parquet": _parquet, ".npz": _npz}
