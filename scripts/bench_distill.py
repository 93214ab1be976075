#!/usr/bin/env python3
"""A small network alone against the same one taught by a fine-tuned network of four times its parameters.

    scripts/bench_distill.py [--seeds 5] [--epochs 60] [--temperature 4.0] [--alpha 0.7]

On the demo data, top-1 in per cent on its 240 test images. The teacher is the backbone that comes with tl-trainer,
fine-tuned with finetune.yaml, but without label smoothing, which makes a worse teacher (Müller, Kornblith and Hinton,
When Does Label Smoothing Help?, 2019); the student is timm's semnasnet_050 from random weights, a quarter of its size.
Both runs of a seed begin with the same weights and see the same images; the interval is Student's t over the seeds'
differences.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from scipy.stats import t

import tl_trainer
from bench_report import report

SIZE = 64
AUGMENTED = [{"RandomResizedCrop": {"size": SIZE, "scale": [0.5, 1.0]}}, "RandomHorizontalFlip"]
COMMON: dict[str, Any] = {
    "data__source": "demo", "data__workers": 0, "transforms__size": SIZE, "transforms__train": AUGMENTED,
    "train__batch_size": 32, "output__report": False, "output__tensorboard": False,
}  # fmt: skip
STUDENT: dict[str, Any] = {
    "model__backbone": "timm/semnasnet_050", "model__weights": "none", "model__trainable": "all",
    "train__search": "off", "train__optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.05},
    "train__schedule": {"name": "cosine", "warmup_epochs": 2.0},
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--alpha", type=float, default=0.7)
    args = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        common = {**COMMON, "output__dir": folder, "features__dir": f"{folder}/features"}
        teacher = tl_trainer.train("finetune.yaml", **common, train__loss={"label_smoothing": 0.0})
        top1, rows = 100 * teacher["test"]["top1"], []
        taught = {"temperature": args.temperature, "alpha": args.alpha, "checkpoint": teacher["checkpoint"]}
        for seed in range(args.seeds):
            words = {**common, **STUDENT, "seed": seed, "train__epochs": args.epochs}
            runs = [tl_trainer.train(None, **words, **of) for of in ({}, {"train__teacher": taught})]
            alone, pupil = (100 * run["test"]["top1"] for run in runs)
            rows.append((seed, alone, pupil, pupil - alone))
            print(f"seed {seed}: alone {alone:.1f}, taught {pupil:.1f}", flush=True)
        sizes = [_parameters(Path(run["checkpoint"])) for run in (teacher, runs[0])]
    gains = [gain for *_, gain in rows]
    mean = statistics.mean(gains)
    half = float(t.ppf(0.975, len(gains) - 1)) * statistics.stdev(gains) / len(gains) ** 0.5 if gains[1:] else 0.0
    means = [statistics.mean(column) for column in list(zip(*rows, strict=True))[1:]]
    print(f"teacher {top1:.1f}, {sizes[0]:,} parameters; student {sizes[1]:,}, {sizes[1] / sizes[0]:.2f} of it")
    print(f"gain {mean:.2f} points, 95% interval {mean - half:.2f} to {mean + half:.2f}")
    report(
        ("seed", "alone", "taught", "gain"),
        [*rows, ("mean", *means)],
        {
            **vars(args), "teacher": top1, "parameters": sizes, "rows": rows, "gain": mean,
            "interval": [mean - half, mean + half], "seconds": round(time.perf_counter() - started, 1),
        },
    )  # fmt: skip


def _parameters(checkpoint: Path) -> int:
    """How many parameters the classifier in a checkpoint has."""
    classifier = tl_trainer.load(checkpoint)._parts.network.classifier
    return sum(parameter.numel() for parameter in classifier.parameters())


if __name__ == "__main__":
    main()
