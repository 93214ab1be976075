#!/usr/bin/env python3
"""finetune.yaml against the best frozen head and against other trainers' fine-tuning, all from the same weights.

    scripts/bench_finetune.py PHOTOS [PHOTOS ...] [--seeds 3] [--epochs 8]
    scripts/bench_finetune.py PHOTOS --cached

PHOTOS: folders with train and val, a folder in each for every class. A row per folder and method: top-1 on val in per
cent, the mean over the seeds with the lowest and the highest, and the seconds of a run. timm's recipe is that of its
train.py for fine-tuning (RandAugment, AdamW, cosine with warm-up, a new random head); fastai's is `fine_tune`, where
fastai is installed.

--cached: the seconds of an epoch that trains the last block and the head, in fp32, with the output of the frozen stages
kept and computed anew, and the ratio of both. Each is the median of the epochs after the first.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.nn import functional
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import tl_trainer
from tl_trainer.models import embedded

BATCH = 32
LAST_BLOCK = "blocks.6"  # of the backbone that comes with tl-trainer


def ours(config: str, photos: Path, seed: int, epochs: int, **words: Any) -> float:
    """Top-1 of a run of tl-trainer, with a cache of its own."""
    with tempfile.TemporaryDirectory() as folder:
        result = tl_trainer.train(
            config, data__root=str(photos), seed=seed, output__dir=folder, features__dir=f"{folder}/features",
            output__report=False, output__tensorboard=False, **words,
        )  # fmt: skip
    top1: float = result["val"]["top1"]
    return top1


def frozen(photos: Path, seed: int, epochs: int) -> float:
    """The best head for the frozen backbone."""
    return ours("default.yaml", photos, seed, epochs)


def finetuned(photos: Path, seed: int, epochs: int) -> float:
    """The head that is found, then all stages."""
    return ours("finetune.yaml", photos, seed, epochs, train__epochs=epochs)


def timms(photos: Path, seed: int, epochs: int) -> float:
    """The best epoch of timm's recipe."""
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size: dict[str, Any] = {"input_size": 224, "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"}
    train = ImageFolder(photos / "train", create_transform(**size, is_training=True, auto_augment="rand-m9-mstd0.5"))
    val = ImageFolder(photos / "val", create_transform(**size))
    network = timm.create_model(embedded.MODEL.removeprefix("timm/"), num_classes=0)
    source = embedded.build(embedded.resolve("DEFAULT"), "penultimate").model.state_dict()
    network.load_state_dict(source)
    network.reset_classifier(len(train.classes))
    network.to(device)
    optimizer = create_optimizer_v2(network, opt="adamw", lr=5e-4, weight_decay=0.05)
    batches = DataLoader(train, BATCH, shuffle=True, drop_last=len(train) > BATCH, num_workers=2)
    schedule = CosineLRScheduler(
        optimizer, epochs * len(batches), warmup_t=len(batches), warmup_lr_init=1e-6, warmup_prefix=True
    )
    best, step = 0.0, 0
    for _ in range(epochs):
        network.train()
        for images, labels in batches:
            schedule.step(step)
            loss = functional.cross_entropy(network(images.to(device)), labels.to(device), label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
        network.eval()
        with torch.inference_mode():
            right = sum(
                int((network(images.to(device)).argmax(dim=1).cpu() == labels).sum())
                for images, labels in DataLoader(val, BATCH, num_workers=2)
            )
        best = max(best, right / len(val))
    return best


def fastais(photos: Path, seed: int, epochs: int) -> float:
    """The last epoch of fastai's `fine_tune`; one of its epochs trains the head alone."""
    from fastai.vision.all import ImageDataLoaders, Resize, accuracy, aug_transforms, set_seed, vision_learner

    set_seed(seed)
    data = ImageDataLoaders.from_folder(
        photos, valid="val", item_tfms=Resize(256), batch_tfms=aug_transforms(size=224), bs=BATCH
    )
    learner = vision_learner(data, embedded.MODEL.removeprefix("timm/"), pretrained=False, metrics=accuracy)
    source = embedded.build(embedded.resolve("DEFAULT"), "penultimate").model.state_dict()
    learner.model[0].model.load_state_dict(source, strict=False)
    learner.freeze()
    learner.fine_tune(epochs - 1)
    return float(learner.validate()[1])


def epoch_seconds(photos: Path, cache: str, epochs: int = 4) -> float:
    """Of an epoch that trains the last block and the head; cache: as `features.cache`."""
    with tempfile.TemporaryDirectory() as folder:
        result = tl_trainer.train(
            "default.yaml", data__root=str(photos), transforms__train="eval", output__dir=folder,
            features__dir=f"{folder}/features", features__cache=cache, output__report=False, output__tensorboard=False,
            model__trainable=LAST_BLOCK, train__search="off", train__epochs=epochs, train__precision="fp32",
            train__batch_size=BATCH,
        )  # fmt: skip
        with Path(result["run_dir"], "metrics.csv").open(newline="") as file:
            return statistics.median(float(row["seconds"]) for row in [*csv.DictReader(file)][1:])


def cached(folders: list[Path]) -> None:
    """Print what an epoch costs with and without the kept output of what is frozen."""
    rows = []
    print(f"{'photographs':20}  {'kept':>7}  {'computed':>8}  {'ratio':>5}")
    for photos in folders:
        kept, computed = (epoch_seconds(photos, cache) for cache in ("auto", "off"))
        print(f"{photos.name:20}  {kept:7.2f}  {computed:8.2f}  {kept / computed:5.2f}", flush=True)
        rows.append({"photographs": photos.name, "kept": kept, "computed": computed, "ratio": kept / computed})
    print(json.dumps(rows))


METHODS: dict[str, Callable[[Path, int, int], float]] = {
    "frozen": frozen, "finetune.yaml": finetuned, "timm": timms, "fastai": fastais
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--cached", action="store_true")
    args = parser.parse_args()
    if args.cached:
        cached(args.photos)
        return
    methods = [name for name in args.methods if name != "fastai" or importlib.util.find_spec("fastai")]
    rows = []
    print(f"{'photographs':20}  {'method':14}  {'top-1':>6}  {'from':>6}  {'to':>6}  {'seconds':>7}")
    for photos in args.photos:
        for method in methods:
            started = time.perf_counter()
            found = [100 * METHODS[method](photos, seed, args.epochs) for seed in range(args.seeds)]
            seconds = (time.perf_counter() - started) / args.seeds
            mean, low, high = sum(found) / len(found), min(found), max(found)
            print(f"{photos.name:20}  {method:14}  {mean:6.2f}  {low:6.2f}  {high:6.2f}  {seconds:7.1f}", flush=True)
            rows.append({"photographs": photos.name, "method": method, "top1": found, "seconds": round(seconds, 1)})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
