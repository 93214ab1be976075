"""Break tl-trainer on purpose and count what is lost. Prints a table and, last, one JSON line.

    scripts/stress/run [ROW ...] [--share 0.1] [--seed 0]

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

from stress import checkpoints, hosts, inputs, ranks, runs, sources
from stress.tools import NotRun, Outcome

Row = Callable[[int, Path, random.Random], Outcome]

ROWS: dict[str, tuple[Row, int]] = {
    "kill-training": (runs.kill_training, 50),
    "kill-save": (checkpoints.kill_save, 200),
    "fsync-order": (hosts.fsync_order, 200),
    "workers": (runs.workers, 30),
    "disk-full": (runs.disk_full, 20),
    "damaged-last": (runs.damaged_last, 100),
    "two-at-once": (runs.two_at_once, 50),
    "signals": (runs.signals, 200),
    "orphans": (runs.orphans, 10),
    "killed-worker": (runs.killed_worker, 10),
    "small-shm": (hosts.small_shm, 40),
    "out-of-memory": (hosts.out_of_memory, 60),
    "extreme-shapes": (hosts.extreme_shapes, 6),
    "second-user": (hosts.second_user, 24),
    "malicious": (checkpoints.malicious, 154),
    "mutated-checkpoints": (checkpoints.mutated_checkpoints, 10_000),
    "mutated-images": (inputs.mutated_images, 20_000),
    "odd-files": (inputs.odd_files, 10),
    "replaced-files": (sources.replaced_files, 56),
    "dataset-untouched": (inputs.dataset_untouched, 1),
    "yaml": (inputs.hostile_yaml, 18),
    "downloads": (sources.downloads, 9),
    "escapes": (inputs.escapes, 10),
    "killed-ranks": (ranks.killed_ranks, 20),
    "ended-agents": (ranks.ended_agents, 6),
    "two-nodes": (ranks.two_nodes, 2),
    "shards": (ranks.shards, 10_000),
    "million": (ranks.million, 1_000_000),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        "scripts/stress/run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
