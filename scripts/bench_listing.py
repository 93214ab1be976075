#!/usr/bin/env python3
"""How memory and time of opening a table grow with its rows, before any image is read.

    scripts/bench_listing.py [--rows 250000 500000 1000000]

Three tables of the same rows: a CSV file of paths, a Parquet file of paths, a Parquet file of images (of a few bytes).
Each is opened with an empty cache, and again. MB are those of Python and numpy (tracemalloc) at the peak and of what is
kept, and of Arrow what is kept; a file that is mapped into memory counts as none.
"""

from __future__ import annotations

import argparse
import csv
import gc
import os
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from bench_report import report
from tl_trainer.config.data import DataSection
from tl_trainer.data.sources import open_dataset

GROUP = 100_000  # rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[250_000, 500_000, 1_000_000])
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["TL_CACHE"] = f"{scratch}/cache"
        for number in args.rows:
            folder = Path(scratch) / str(number)
            write(folder, number)
            for table, keys in TABLES.items():
                rows.append({"table": table, "rows": number, **opened(keys, folder)})
    report(list(rows[0]), [list(row.values()) for row in rows], {"rows": rows})


TABLES: dict[str, dict[str, Any]] = {
    "csv": {"source": "csv"},
    "parquet, paths": {"source": "parquet", "parquet": {"files": "paths.parquet"}},
    "parquet, images": {"source": "parquet", "parquet": {"files": "images.parquet"}},
}


def write(folder: Path, number: int) -> None:
    """The three tables, an hour old, and the first image that they name."""
    (folder / "photos").mkdir(parents=True)
    (folder / "photos" / "000000000.jpg").touch()
    paths, labels = [f"photos/{row:09}.jpg" for row in range(number)], [f"class {row % 1000}" for row in range(number)]
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *zip(paths, labels, strict=True)])
    parquet.write_table(pyarrow.table({"image": paths, "label": labels}), folder / "paths.parquet", GROUP)
    values = pyarrow.array([path.encode() for path in paths])
    parquet.write_table(pyarrow.table({"image": values, "label": labels}), folder / "images.parquet", GROUP)
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)


def opened(keys: dict[str, Any], folder: Path) -> dict[str, float]:
    """Seconds with an empty cache and without, then MB under tracemalloc, which makes it slower."""
    data = DataSection.model_validate({"root": str(folder), **keys})
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        open_dataset(data)
        seconds.append(time.perf_counter() - started)
    gc.collect()
    arrow = pyarrow.total_allocated_bytes()
    tracemalloc.start()
    dataset = open_dataset(data)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    mapped = pyarrow.total_allocated_bytes() - arrow
    del dataset
    figures = {"peak MB": peak / 1e6, "kept MB": kept / 1e6, "Arrow MB": mapped / 1e6}
    return {"first s": seconds[0], "again s": seconds[1], **figures}


if __name__ == "__main__":
    main()
