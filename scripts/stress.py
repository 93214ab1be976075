#!/usr/bin/env python3
"""Break tl-trainer on purpose and count what is lost. Prints a table and, last, one JSON line.

    scripts/stress [ROW ...] [--share 0.1] [--seed 0]

Each row is a function (count, folder, random numbers) -> Outcome with its full count in ROWS; the tests run the same
functions with small counts. Ends with 1 where anything was lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import stress_checkpoints
import stress_hosts
import stress_inputs
import stress_runs
import stress_sources
from stress_tools import NotRun, Outcome

Row = Callable[[int, Path, random.Random], Outcome]

ROWS: dict[str, tuple[Row, int]] = {
    "kill-training": (stress_runs.kill_training, 50),
    "kill-save": (stress_checkpoints.kill_save, 200),
    "fsync-order": (stress_hosts.fsync_order, 200),
    "workers": (stress_runs.workers, 30),
    "disk-full": (stress_runs.disk_full, 20),
    "damaged-last": (stress_runs.damaged_last, 100),
    "two-at-once": (stress_runs.two_at_once, 50),
    "signals": (stress_runs.signals, 200),
    "orphans": (stress_runs.orphans, 10),
    "killed-worker": (stress_runs.killed_worker, 10),
    "small-shm": (stress_hosts.small_shm, 40),
    "out-of-memory": (stress_hosts.out_of_memory, 60),
    "malicious": (stress_checkpoints.malicious, 154),
    "mutated-checkpoints": (stress_checkpoints.mutated_checkpoints, 10_000),
    "mutated-images": (stress_inputs.mutated_images, 20_000),
    "odd-files": (stress_inputs.odd_files, 10),
    "replaced-files": (stress_sources.replaced_files, 56),
    "dataset-untouched": (stress_inputs.dataset_untouched, 1),
    "yaml": (stress_inputs.hostile_yaml, 18),
    "downloads": (stress_sources.downloads, 9),
    "escapes": (stress_inputs.escapes, 10),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; default all")
    parser.add_argument("--share", type=float, default=1.0, help="the part of the full counts that is tried")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    args = parser.parse_args()
    if unknown := sorted({*args.rows} - {*ROWS}):
        parser.error(f"no such row: {', '.join(unknown)} (rows: {', '.join(ROWS)})")
    torch.set_num_threads(1)  # a child must not inherit a pool of threads that are not there
    logging.getLogger("tl_trainer").setLevel(logging.CRITICAL)
    print(f"seed {args.seed}")
    print(f"{'row':20} {'count':>6} {'lost':>5} {'seconds':>8}  note")
    results = {}
    for name in args.rows or ROWS:
        results[name] = tried(name, args.share, args.seed)
        found = results[name]
        notes = found["notes"] or [""]
        print(f"{name:20} {found['count']:>6} {found['lost']:>5} {found['seconds']:>8.1f}  {notes[0]}", flush=True)
        for note in notes[1:6]:
            print(f"{'':43}{note}", flush=True)
    lost = sum(row["lost"] for row in results.values())
    print(json.dumps({"seed": args.seed, "share": args.share, "lost": lost, "rows": results}))
    return 1 if lost else 0


def tried(name: str, share: float, seed: int) -> dict[str, Any]:
    """One row: its count, what was lost, the seconds it took, and its notes."""
    function, count = ROWS[name]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="stress-") as folder:
        try:
            outcome = function(max(1, round(count * share)), Path(folder), random.Random(f"{seed} {name}"))
        except NotRun as reason:
            outcome = Outcome(notes=[f"not run: {reason}"])
    seconds = round(time.perf_counter() - started, 1)
    return {"count": outcome.tried, "lost": outcome.lost, "seconds": seconds, "notes": outcome.notes}


if __name__ == "__main__":
    sys.exit(main())
