#!/usr/bin/env python3
"""tl-train against the loop that every tutorial shows, on the same images, as whole processes.

    scripts/bench_train.py DIR --backbone resnet152 --epochs 40

plain: fp32, NCHW, a DataLoader with a worker per core, the whole network in every epoch, only the head trained. One
epoch (training and validation) is measured and the others are extrapolated from it.
cold: tl-train with an empty cache, from the start of the process to its end. warm: the same again.
All of them start from one file of random weights and preprocess in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from bench_report import report

SIZES = {"efficientnet_v2_s": 300}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an ImageFolder with train and val")
    parser.add_argument("--backbone", default="resnet152")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--plain-only", metavar="WEIGHTS", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.plain_only:
        plain_epoch(args.folder, args.backbone, args.batch, Path(args.plain_only))
        return
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights.pth"
        torch.save(torchvision.models.get_model(args.backbone, weights=None).state_dict(), weights)
        seconds = {"plain": _plain_seconds(args, weights)}
        for name in ("cold", "warm"):
            seconds[name] = _tl_train_seconds(args, weights, Path(scratch))
    rows = [[name, value, seconds["plain"] / value] for name, value in seconds.items()]
    print(f"{args.backbone}, {args.epochs} epochs on {args.folder.name}; plain is extrapolated from one epoch")
    result = {"backbone": args.backbone, "epochs": args.epochs, "seconds": seconds}
    result["ratios"] = {name: seconds["plain"] / seconds[name] for name in ("cold", "warm")}
    report(["", "seconds", "times faster"], rows, result)


def _size(backbone: str) -> int:
    return SIZES.get(backbone, 224)


def _plain_seconds(args: argparse.Namespace, weights: Path) -> float:
    words = [sys.executable, __file__, args.folder, "--backbone", args.backbone, "--batch", args.batch]
    words += ["--plain-only", weights]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True)
    whole = time.perf_counter() - started
    epoch = float(json.loads(done.stdout)["epoch"])
    return whole + epoch * (args.epochs - 1)


def plain_epoch(folder: Path, backbone: str, batch: int, weights: Path) -> None:
    """Train one epoch as tutorials do and print its seconds."""
    size, resize = _size(backbone), _size(backbone) + 32
    pipeline = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(resize),
            torchvision.transforms.CenterCrop(size),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    loaders = {
        name: DataLoader(
            ImageFolder(folder / name, pipeline), batch, shuffle=name == "train", num_workers=os.cpu_count() or 1
        )
        for name in ("train", "val")
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = torchvision.models.get_model(backbone, weights=None)
    model.load_state_dict(torch.load(weights, weights_only=True))
    model.requires_grad_(False)
    name, last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Linear(last.in_features, len(loaders["train"].dataset.classes)))  # type: ignore[attr-defined]
    model.to(device)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    started = time.perf_counter()
    model.train()
    for images, labels in loaders["train"]:
        loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        correct = sum(
            (model(images.to(device)).argmax(1).cpu() == labels).sum().item() for images, labels in loaders["val"]
        )
    print(json.dumps({"epoch": time.perf_counter() - started, "correct": correct}))


def _tl_train_seconds(args: argparse.Namespace, weights: Path, scratch: Path) -> float:
    size = _size(args.backbone)
    words = [Path(sys.executable).with_name("tl-train"), "--data-dir", args.folder, "--quiet"]
    words += ["--epochs", args.epochs, "-b", args.batch, "--output", scratch / "runs"]
    words += [f"model.backbone={args.backbone}", f"model.weights={weights}", "transforms.train=eval"]
    words += [f"transforms.eval=[{{Resize: {size + 32}}}, {{CenterCrop: {size}}}]"]
    started = time.perf_counter()
    environment = {**os.environ, "TL_CACHE": str(scratch / "cache")}
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
