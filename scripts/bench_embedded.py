#!/usr/bin/env python3
"""What the pretraining of tiny_resnet gives: top-1 in % on its features and on those of the same network at random.

    scripts/bench_embedded.py [DIR] [--weights FILE] [--seeds 5]

`demo, trained` is the demo data through tl-train, on its test split, the mean of the seeds. `probed` is logistic
regression on the standardised features of all pictures at 96 px, of the demo or of DIR, 10-fold cross-validation twice,
against three random networks; in `calibrated` the statistics of BatchNorm are those of the pictures. Needs the extra
`dev` for scikit-learn: scripts/install dev, then .venv/bin/python scripts/bench_embedded.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from bench_report import report
from tl_trainer.data import transforms
from tl_trainer.data.demo import demo_folder
from tl_trainer.data.folders import open_folders
from tl_trainer.models.backbones import build_backbone, preprocessing, resolve_weights

BACKBONE = "tiny_resnet"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="a folder of photographs, as tl-train takes it")
    parser.add_argument("--weights", default="DEFAULT", help="instead of those in the package, a state_dict file")
    parser.add_argument("--seeds", type=int, default=5, help="runs on the demo data (default 5)")
    args = parser.parse_args()
    tops = ([trained(weights, seed) for seed in range(args.seeds)] for weights in (args.weights, "none"))
    rows = [compared("demo, trained", *tops)]
    for name, folder in (("demo", demo_folder()), *([(args.folder.name, args.folder)] if args.folder else [])):
        images, targets = pictures(folder)
        for kind, calibrated in (("probed", False), ("probed, calibrated", True)):
            networks = [(args.weights, 0), *(("none", seed) for seed in range(3))]
            pretrained, *random = (probed(weights, seed, images, targets, calibrated) for weights, seed in networks)
            rows.append(compared(f"{name}, {kind}", [pretrained], random))
    report(["data", "pretrained", "random", "margin"], rows, {"weights": args.weights, "rows": rows})


def compared(name: str, pretrained: Sequence[float], random: Sequence[float]) -> tuple[str, float, float, float]:
    first, second = 100 * mean(pretrained), 100 * mean(random)
    return name, first, second, first - second


def trained(weights: str, seed: int) -> float:
    """Top-1 on the demo's test split after tl-train."""
    with tempfile.TemporaryDirectory() as folder:
        words = [f"model.weights={weights}", f"seed={seed}", f"output.dir={folder}", "output.report=false"]
        command = [Path(sys.executable).with_name("tl-train"), "--config", "demo.yaml", "--quiet", "--json", *words]
        summary = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return float(summary["test"]["top1"])


def pictures(folder: Path) -> tuple[Tensor, list[int]]:
    """All pictures of all splits as the network wants them, and their classes."""
    steps = transforms.spell_out("default", preprocessing(BACKBONE, None), train=False)
    pipeline = transforms.Pipeline(steps, "transforms.eval")
    splits = open_folders(folder, None).splits.values()
    images = torch.stack([pipeline.image(split.open(index)) for split in splits for index in range(len(split))])
    return pipeline.batch(images), [target for split in splits for target in split.targets]


@torch.inference_mode()
def probed(weights: str, seed: int, images: Tensor, targets: list[int], calibrated: bool) -> float:
    """Top-1 of logistic regression on the features, over the folds."""
    network = build_backbone(BACKBONE, resolve_weights(BACKBONE, weights), "penultimate", seed).eval()
    if calibrated:
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None  # the plain mean over what it sees, which here is all of them at once
        network.train()(images)
        network.eval()
    features = torch.cat([network(batch) for batch in images.split(100)]).numpy()
    folds = RepeatedStratifiedKFold(n_splits=10, n_repeats=2, random_state=0)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    return float(np.mean(cross_val_score(probe, features, targets, cv=folds)))


if __name__ == "__main__":
    main()
