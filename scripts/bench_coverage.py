#!/usr/bin/env python3
"""How often the sets of `tl-predict --coverage` hold the label: from half of the validation images, on the other half.

    scripts/bench_coverage.py DATA [--backbone efficientnet_lite0] [--coverage 0.8 0.9 0.95]

DATA: an ImageFolder with a val split, on which a head is found. `coverage`: the mean over 100 random halves; `size`:
the classes in a set. `top1` is what sets of the first class alone would hold: no coverage is lower than that.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch

import tl_trainer
from bench_report import report
from tl_trainer import conformal
from tl_trainer.assembly import restore
from tl_trainer.evaluation import evaluate_checkpoint
from tl_trainer.metrics import Scores

COLUMNS = ("backbone", "val", "top1", "asked", "coverage", "size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--coverage", nargs="+", type=float, default=[0.8, 0.9, 0.95])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": {"backbone": args.backbone},
            "transforms": {"train": "eval"},
            "output": {"dir": folder, "report": False, "tensorboard": False},
        }
        best = Path(tl_trainer.train(settings, data__root=str(args.data))["checkpoint"])
        found = evaluate_checkpoint(restore(best), "val")
    scores, temperature, rows = found.scores, found.checkpoint.temperature, []
    for asked in args.coverage:
        generator, measured = torch.Generator().manual_seed(0), []
        for _ in range(100):
            halves = torch.randperm(len(scores.targets), generator=generator).tensor_split(2)
            known, others = (Scores(scores.logits[half], scores.targets[half]) for half in halves)
            most = conformal.threshold(conformal.label_scores(known, temperature), asked)
            measured.append(conformal.measure(others, temperature, most))
        coverage, size = (sum(one[name] for one in measured) / 100 for name in ("coverage", "mean_set_size"))
        rows.append((args.backbone, len(scores.targets), found.measured["top1"], asked, coverage, size))
    report(COLUMNS, rows, {"rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]})


if __name__ == "__main__":
    main()
