#!/usr/bin/env python3
"""What `tl-train --add-class` gives beside training with the class from the beginning.

    scripts/bench_added_class.py DATA [--backbone efficientnet_lite0] [--images 20] [--classes 5]

DATA: an ImageFolder with train and val. Each of its first classes is left out of training in turn and added with so
many of its training images. Both heads are judged on the same val images. `seconds`: of adding, without the start.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import tl_trainer
from bench_report import report

COLUMNS = ("class", "added", "retrained", "recall_added", "recall_retrained", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--classes", type=int, default=5)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in sorted(path.name for path in (args.data / "train").iterdir() if path.is_dir())[: args.classes]:
            few, without, runs = Path(folder, name, "few"), Path(folder, name, "without"), Path(folder, name, "runs")
            linked(args.data, few, name, args.images)
            linked(args.data, without, name, 0)
            settings = {
                "model": {"backbone": args.backbone},
                "transforms": {"train": "eval"},
                "output": {"dir": str(runs), "report": False, "tensorboard": False},
            }
            best = tl_trainer.train(settings, data__root=str(without))["checkpoint"]
            added = tl_trainer.load(best).add_class(name, few / "train" / name, output=runs)
            retrained = tl_trainer.train(settings, data__root=str(few))["checkpoint"]
            top1s, recalls = [], []
            for checkpoint in (added["checkpoint"], retrained):
                evaluation = Path(runs, f"report-{len(top1s)}")
                model = tl_trainer.load(checkpoint, data__root=str(few))
                top1s.append(model.evaluate("val", report=evaluation)["top1"])
                recalls.append(recall_in(evaluation / "per_class.csv", name))
            rows.append((name, *top1s, *recalls, added["seconds"]))
    report(COLUMNS, rows, {"rows": [dict(zip(COLUMNS, row, strict=True)) for row in rows]})


def linked(data: Path, out: Path, name: str, most: int) -> None:
    """The dataset as links, with at most so many training images of a class; with none also without its val images."""
    for split in ("train", "val"):
        for source in sorted(path for path in (data / split).iterdir() if path.is_dir()):
            files = sorted(source.iterdir())
            if source.name == name:
                files = files[:most] if split == "train" or not most else files
            if files:
                (out / split / source.name).mkdir(parents=True)
            for file in files:
                (out / split / source.name / file.name).symlink_to(file.resolve())


def recall_in(table: Path, name: str) -> float:
    rows = [line.split(",") for line in table.read_text().splitlines()]
    return next(float(row[rows[0].index("recall")]) for row in rows if row[0] == name)


if __name__ == "__main__":
    main()
