#!/usr/bin/env python3
"""How well `tl-predict --reject` tells what it was trained on from other photographs.

    scripts/bench_reject.py DATA UNKNOWN [--backbone efficientnet_lite0] [--images 400]

DATA: an ImageFolder, on which a head is found. UNKNOWN: a folder of anything else. `auroc`: how often a val image
lies nearer to the training images than an unknown one. `accepted`: the share of halves of validation that is accepted
with the threshold of the other half, over 100 draws.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from sklearn.metrics import roc_auc_score

import tl_trainer
from bench_report import report
from tl_trainer.assembly import restore
from tl_trainer.data.folders import walk
from tl_trainer.data.images import ENDINGS
from tl_trainer.known import ACCEPTED, NEAREST, known
from tl_trainer.predict import embed

COLUMNS = ("backbone", "val", "unknown", "auroc", "accepted", "unknown_accepted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("unknown", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=400, help="of the unknown at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            "model": {"backbone": args.backbone},
            "transforms": {"train": "eval"},
            "output": {"dir": folder, "report": False, "tensorboard": False},
        }
        best = Path(tl_trainer.train(settings, data__root=str(args.data))["checkpoint"])
        parts = restore(best)
        found = known(parts, best)
    paths = [path for path in walk(args.unknown) if path.suffix.lower() in ENDINGS]
    strange = embed(parts, paths[:: max(1, -(-len(paths) // args.images))], 16)
    similarities = found.similarities(strange, NEAREST)
    others = similarities[0][:, -1]
    truth = [1] * len(found.val) + [0] * len(others)
    auroc = roc_auc_score(truth, torch.cat([found.val, others]).tolist())
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(100):
        order = torch.randperm(len(found.val), generator=generator)
        half, rest = found.val[order].tensor_split(2)
        shares.append((rest >= torch.quantile(half, 1 - ACCEPTED)).double().mean().item())
    taken = found.accepted(similarities)
    row = (args.backbone, len(found.val), len(others), auroc, sum(shares) / 100, sum(taken) / len(taken))
    report(COLUMNS, [row], dict(zip(COLUMNS, row, strict=True)))


if __name__ == "__main__":
    main()
