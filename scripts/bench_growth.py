#!/usr/bin/env python3
"""How memory and time of checking images and extracting their features grow with their number.

    scripts/bench_growth.py DIR [--backbone alexnet] [--images 2000 4000 8000]

Each number is a process of its own with an empty cache, on as many different images, made from those in DIR by turning
their colours. `growth` is the peak of the resident memory over that after the first chunks of images, in MB, with the
features left on disk; tl-train then holds them in memory where they fit, which takes their size once more.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image

from bench_report import report
from tl_trainer import features
from tl_trainer.config.data import DataSection
from tl_trainer.data import transforms
from tl_trainer.data.dataset import Split
from tl_trainer.data.folders import open_folders
from tl_trainer.data.verify import Memory, verified
from tl_trainer.features import IMAGES_AT_ONCE, Extractor
from tl_trainer.ground.machine import cores
from tl_trainer.models.backbones import build_backbone, resolve_weights
from tl_trainer.models.classifier import Classifier
from tl_trainer.network import Network


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder with photographs")
    parser.add_argument("--backbone", default="alexnet")
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 4000, 8000])
    parser.add_argument("--extract", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.extract:
        print(json.dumps(extract(args.folder, args.backbone, args.extract)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        alter(sorted(args.folder.rglob("*.jpg")), Path(scratch), max(args.images))
        rows = []
        for number in args.images:
            words = [sys.executable, __file__, scratch, "--backbone", args.backbone, "--extract", str(number)]
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            rows.append({"images": number, **json.loads(done.stdout)})
    rows[0]["times"] = None
    for before, row in pairwise(rows):
        row["times"] = row["seconds"] / before["seconds"]
    report(list(rows[0]), [list(row.values()) for row in rows], {"backbone": args.backbone, "rows": rows})


def alter(photographs: list[Path], folder: Path, number: int) -> None:
    """`number` different JPEG files of two classes."""
    for name in ("a", "b"):
        (folder / name).mkdir()
    with ProcessPoolExecutor(cores()) as pool:
        jobs = [(photographs[index % len(photographs)], folder, index) for index in range(number)]
        for _ in pool.map(_alter, *zip(*jobs, strict=True), chunksize=50):
            pass


def _alter(photograph: Path, folder: Path, index: int) -> None:
    hue = random.Random(index).randrange(256)
    with Image.open(photograph) as opened:
        bands = opened.convert("HSV").split()
    turned = bands[0].point(lambda value: (value + hue) % 256)
    picture = Image.merge("HSV", (turned, *bands[1:])).convert("RGB")
    picture.save(folder / "ab"[index % 2] / f"{index:05}.jpg", comment=f"{index}")


def extract(folder: Path, backbone: str, number: int) -> dict[str, float]:
    """Seconds and MB of checking the first `number` images and extracting their features into an empty cache."""
    split = open_folders(folder, None).splits["all"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = resolve_weights(backbone, "none")
    classifier = Classifier(build_backbone(backbone, weights, "penultimate", 0), torch.nn.Identity(), "head").eval()
    pipeline = transforms.Pipeline(transforms.spell_out("default", weights.preset, train=False), "")
    features.free_memory = lambda: 0
    with tempfile.TemporaryDirectory() as cache:
        prefix, memory = Network(classifier, device, "auto").prefix, Memory(Path(cache) / "files.sqlite")
        extractor = Extractor(prefix, {"name": backbone}, Path(cache), sys.maxsize, device)

        def extracted(images: Split, name: str) -> None:
            extractor.features(verified(images, name, DataSection(), memory), name, pipeline)

        extracted(split.subset(range(2 * IMAGES_AT_ONCE[device.type])), "first")
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        extracted(split.subset(range(number)), "all")
        seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "growth": (peak - before) / 1024}


if __name__ == "__main__":
    main()
