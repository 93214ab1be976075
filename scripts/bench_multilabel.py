#!/usr/bin/env python3
"""The head that is found for several labels per image against scikit-learn's one-vs-rest logistic regression.

    scripts/bench_multilabel.py [FOLDER] [--images N] [--size PIXELS]

FOLDER has a folder for each class; left out, the demo's drawings are taken. Each image is composed of two or three of
them, of different classes, which are its labels; no picture is in two splits. scikit-learn gets the same features and
the best C of 13 on each of three scalings by mean average precision on val; `best_on_test` is the best there is, which
nobody may choose by.
"""

from __future__ import annotations

import argparse
import csv
import random
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.preprocessing import Normalizer, StandardScaler

import tl_trainer
from bench_report import report
from tl_trainer.data.demo import demo_folder
from tl_trainer.data.folders import walk
from tl_trainer.data.images import ENDINGS

SHARES = {"train": 0.5, "val": 0.2, "test": 0.3}
STRENGTHS = [10.0**power for power in np.arange(-4, 2.1, 0.5)]


def compose(sources: Path, folder: Path, images: int, size: int) -> list[str]:
    """Write the images and labels.csv; the class names."""
    dice, rows = random.Random(0), []
    classes = sorted(path.name for path in sources.iterdir() if path.is_dir())
    pictures: dict[str, dict[str, list[Path]]] = {}
    for name in classes:
        found = [path for path in walk(sources / name) if path.suffix.lower() in ENDINGS]
        dice.shuffle(found)
        ends = [round(len(found) * end) for end in np.cumsum([0, *SHARES.values()])]
        pictures[name] = {split: found[ends[at] : ends[at + 1]] for at, split in enumerate(SHARES)}
    for split, share in SHARES.items():
        for number in range(round(images * share)):
            labels = dice.sample(classes, dice.choice([2, 3]))
            canvas = Image.new("RGB", (size, size), (200, 200, 200))
            for name, cell in zip(labels, dice.sample(range(4), len(labels)), strict=True):
                picture = Image.open(dice.choice(pictures[name][split])).convert("RGB").resize((size // 2, size // 2))
                canvas.paste(picture, (cell % 2 * size // 2, cell // 2 * size // 2))
            canvas.save(folder / f"{split}-{number}.png")
            rows.append((f"{split}-{number}.png", "|".join(labels), split))
    with (folder / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label", "split"), *rows])
    return classes


def reference(features: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> dict[str, float]:
    """scikit-learn's mean average precision on test: with what val chose, and the best there is."""
    chosen, on_val, best = 0.0, -1.0, 0.0
    for scaler in (StandardScaler(), Normalizer(), None):
        rows = dict(features)
        if scaler is not None:
            scaler.fit(features["train"])
            rows = {split: scaler.transform(of) for split, of in features.items()}
        for c in STRENGTHS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = OneVsRestClassifier(LogisticRegression(C=c, max_iter=2000)).fit(rows["train"], labels["train"])
            said = {split: model.decision_function(rows[split]) for split in ("val", "test")}
            val, test = (average_precision_score(labels[split], shares) for split, shares in said.items())
            best = max(best, test)
            if val > on_val:
                on_val, chosen = val, test
    return {"chosen_on_val": chosen, "best_on_test": best}


def main() -> None:
    """Compose, train, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--size", type=int, default=224)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "images")
        folder.mkdir()
        classes = compose(args.folder or demo_folder() / "train", folder, args.images, args.size)
        data = {"source": "csv", "task": "multilabel", "root": str(folder), "csv": {"split_column": "split"}}
        started = time.perf_counter()
        result = tl_trainer.train(
            {"data": data, "transforms": {"train": "eval", "size": args.size}, "train": {"precision": "fp32"}},
            output={"dir": str(Path(place, "runs")), "report": False, "tensorboard": False},
        )
        seconds = time.perf_counter() - started
        model = tl_trainer.load(result["checkpoint"])
        with (folder / "labels.csv").open() as file:
            rows = [*csv.DictReader(file)]
        features, labels = {}, {}
        for split in SHARES:
            own = [row for row in rows if row["split"] == split]
            features[split] = model.embed([folder / row["id"] for row in own]).numpy()
            labels[split] = np.array([[name in row["label"].split("|") for name in classes] for row in own]).astype(int)
    found: dict[str, Any] = {"map": result["test"]["map"], **reference(features, labels), "seconds": seconds}
    report(
        ("figure", "value"),
        [*found.items()],
        {**found, "images": args.images, "settings": result["search"]["settings"]},
    )


if __name__ == "__main__":
    main()
