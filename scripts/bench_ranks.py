#!/usr/bin/env python3
"""Strong scaling of extraction on this host's cores: one process on one core against a rank for each core.

    scripts/bench_ranks.py PHOTOS [--backbone efficientnet_lite0] [--rounds 3]

PHOTOS: a folder that tl-train takes. Each run has a feature cache of its own; what is timed is `Extractor.features`,
from its first call to its last return on any rank. The best round of each counts, and both take turns in every round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench_report import report
from stress.ranks import forked
from tl_trainer.features import Extractor
from tl_trainer.ground.machine import cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, best = (1, cores()), dict[int, float]()
    words = [args.folder.resolve(), f"model.backbone={args.backbone}", "device=cpu", "output.report=false",
             "output.tensorboard=false"]  # fmt: skip
    for _ in range(args.rounds):
        for count in counts:
            with tempfile.TemporaryDirectory() as place:
                seconds = extraction(count, words, Path(place))
            best[count] = min(seconds, best.get(count, seconds))
    rows = [(count, best[count], best[1] / best[count]) for count in counts]
    columns = ("ranks", "seconds", "speedup")
    report(columns, rows, {"extraction": [dict(zip(columns, row, strict=True)) for row in rows]})


def extraction(count: int, words: list[Any], place: Path) -> float:
    """The seconds that so many ranks take, each on a core of its own."""
    marks = place / "marks"
    ranks = forked("train", count, *words, "--output", place / "runs", logs=place, prepare=partial(marking, marks))
    assert all(rank.code == 0 for rank in ranks), ranks[0].said()
    times = [float(line) for line in marks.read_text().splitlines()]
    return max(times) - min(times)


def marking(marks: Path) -> None:
    """Keep this rank to its core, and note when features are asked for and there."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(os.environ["RANK"])]})
    features = Extractor.features

    def timed(*arguments: Any, **named: Any) -> Any:
        with marks.open("a") as file:
            file.write(f"{time.monotonic()}\n")
            file.flush()
            found = features(*arguments, **named)
            file.write(f"{time.monotonic()}\n")
        return found

    Extractor.features = timed  # type: ignore[method-assign]


if __name__ == "__main__":
    main()
