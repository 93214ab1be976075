#!/usr/bin/env python3
"""Images a second of checking, of decoding alone, computing alone, and both together as tl-train extracts features.

    scripts/bench_pipeline.py DIR [--backbone resnet152] [--images 400]

On a processor, decoding and computing share the cores, so the best that both together can do is
1 / (1/decode + 1/compute); `of best` is the share of that.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench_report import report
from tl_trainer.config.data import DataSection
from tl_trainer.data import transforms
from tl_trainer.data.folders import open_folders
from tl_trainer.data.verify import verified
from tl_trainer.features import IMAGES_AT_ONCE, Extractor
from tl_trainer.ground.machine import cores
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.network import Network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an ImageFolder")
    parser.add_argument("--backbone", default="resnet152")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    split = next(iter(open_folders(args.folder, None).splits.values()))
    split = split.subset([index * len(split) // args.images for index in range(min(args.images, len(split)))])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = resolve_weights(args.backbone, "none")
    pipeline = transforms.Pipeline(transforms.spell_out("default", weights.preset, train=False), "")
    classifier = Classifier(
        build_backbone(args.backbone, weights, "penultimate", 0), torch.nn.Identity(), "head"
    ).eval()
    checked = verified(split, "all", DataSection(), None)
    batch = torch.stack([pipeline.image(split.open(index)) for index in range(IMAGES_AT_ONCE[device.type])])

    def check() -> None:
        verified(split, "all", DataSection(), None)

    def decode() -> None:
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(lambda index: pipeline.image(split.open(index)), range(len(split))):
                pass

    prefix = Network(classifier, device, "auto").prefix()

    def compute() -> None:
        for _ in range(-(-len(split) // len(batch))):
            prefix(pipeline.batch(batch.to(device)))
        if device.type == "cuda":
            torch.cuda.synchronize()

    def extract() -> None:
        with tempfile.TemporaryDirectory() as folder:
            extractor = Extractor(lambda: prefix, {"name": args.backbone}, Path(folder), sys.maxsize, device)
            extractor.features(checked, "all", pipeline)

    contenders = {"check": check, "decode": decode, "compute": compute, "together": extract}
    rates = dict.fromkeys(contenders, 0.0)
    compute()
    for _ in range(args.rounds):
        for name, function in contenders.items():
            started = time.perf_counter()
            function()
            rates[name] = max(rates[name], len(split) / (time.perf_counter() - started))
    best = 1 / (1 / rates["decode"] + 1 / rates["compute"])
    result = {"backbone": args.backbone, "images": len(split), **rates, "of_best": rates["together"] / best}
    columns = ["backbone", "images", *(f"{name}/s" for name in contenders), "of best"]
    report(columns, [list(result.values())], result)


if __name__ == "__main__":
    main()
