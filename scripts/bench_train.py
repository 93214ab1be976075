#!/usr/bin/env python3
"""tl-train against the loop that every tutorial shows, and against timm and fastai where they are installed.

    scripts/bench_train.py DIR --backbone resnet152 --epochs 40

All train a new head on the same images and a frozen backbone, each as a process of its own, timed from its start to its
end. plain (fp32, NCHW, a DataLoader with a worker per core, the whole network in every epoch), timm and fastai run one
epoch of training and validation; the other epochs are extrapolated from it. cold: tl-train with an empty cache, all
epochs, without TensorBoard and report, which the others do not write either. warm: the same again. report: once more
with both, as by default. plain and tl-train start from one file of random weights and preprocess in the same way.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from bench_report import report

SIZES = {"efficientnet_v2_s": 300}
TIMM_NAMES = {"efficientnet_v2_s": "tf_efficientnetv2_s"}
BARE = ["output.report=false", "output.tensorboard=false"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="an ImageFolder with train and val")
    parser.add_argument("--backbone", default="resnet152")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--one-epoch", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.size = SIZES.get(args.backbone, 224)
    if args.one_epoch:
        print(json.dumps({"epoch": CONTENDERS[args.one_epoch](args)}))
        return
    with tempfile.TemporaryDirectory() as scratch:
        args.weights = Path(scratch) / "weights.pth"
        torch.save(torchvision.models.get_model(args.backbone, weights=None).state_dict(), args.weights)
        seconds = {name: _extrapolated(name, args) for name in _installed(args.backbone)}
        for name, extras in (("cold", BARE), ("warm", BARE), ("report", [])):
            seconds[name] = _tl_train_seconds(args, Path(scratch), extras)
    ratios = {name: seconds["plain"] / value for name, value in seconds.items()}
    print(f"{args.backbone}, {args.epochs} epochs on {args.folder.name}; seconds of the whole process")
    rows = [[name, value, ratios[name]] for name, value in seconds.items()]
    result = {"backbone": args.backbone, "epochs": args.epochs, "seconds": seconds, "ratios": ratios}
    report(["", "seconds", "times faster"], rows, result)


def _installed(backbone: str) -> list[str]:
    """plain, and the libraries that are installed and have the backbone."""
    names = ["plain", *(name for name in ("timm", "fastai") if importlib.util.find_spec(name))]
    if "timm" in names:
        import timm

        if not timm.is_model(TIMM_NAMES.get(backbone, backbone)):
            names.remove("timm")
    return names


def _extrapolated(name: str, args: argparse.Namespace) -> float:
    words = [sys.executable, __file__, args.folder, "--backbone", args.backbone, "--batch", args.batch]
    words += ["--weights", args.weights, "--one-epoch", name]
    started = time.perf_counter()
    done = subprocess.run(list(map(str, words)), check=True, stdout=subprocess.PIPE, text=True)
    whole = time.perf_counter() - started
    return whole + float(json.loads(done.stdout.splitlines()[-1])["epoch"]) * (args.epochs - 1)


def _tl_train_seconds(args: argparse.Namespace, scratch: Path, extras: Sequence[str]) -> float:
    words = [sys.executable, "-c", "import sys; from tl_trainer.cli.train import main; sys.exit(main())"]
    words += ["--data-dir", args.folder, "--quiet", "--epochs", args.epochs, "-b", args.batch, "--output", scratch]
    words += [*extras, "model.head.normalise=l2"]  # features of random weights may be too large to learn from
    words += [f"model.backbone={args.backbone}", f"model.weights={args.weights}", "transforms.train=eval"]
    words += [f"transforms.eval=[{{Resize: {args.size + 32}}}, {{CenterCrop: {args.size}}}]"]
    started = time.perf_counter()
    environment = {**os.environ, "TL_CACHE": str(scratch / "cache")}
    subprocess.run(list(map(str, words)), check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def _plain_epoch(args: argparse.Namespace) -> float:
    pipeline = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(args.size + 32),
            torchvision.transforms.CenterCrop(args.size),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    workers = os.cpu_count() or 1
    train, val = (ImageFolder(args.folder / name, pipeline) for name in ("train", "val"))
    model = torchvision.models.get_model(args.backbone, weights=None)
    model.load_state_dict(torch.load(args.weights, weights_only=True))
    model.requires_grad_(False)
    name, last = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.Linear(last.in_features, len(train.classes)))
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    loaders = DataLoader(train, args.batch, True, num_workers=workers), DataLoader(val, args.batch, num_workers=workers)
    return _seconds_of_epoch(model.to(DEVICE), optimizer, *loaders)


def _timm_epoch(args: argparse.Namespace) -> float:
    """timm's model, data set, loader and optimizer, with the loop of its training script, which its package lacks."""
    import timm
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2

    train, val = (create_dataset("", root=str(args.folder), split=name) for name in ("train", "val"))
    model = timm.create_model(TIMM_NAMES.get(args.backbone, args.backbone), num_classes=len(train.reader.class_to_idx))
    model.requires_grad_(False)
    model.get_classifier().requires_grad_(True)
    common: dict[str, Any] = {"input_size": (3, args.size, args.size), "batch_size": args.batch, "device": DEVICE}
    common |= {"use_prefetcher": False, "num_workers": os.cpu_count() or 1}
    loaders = create_loader(train, is_training=True, no_aug=True, **common), create_loader(val, **common)
    return _seconds_of_epoch(model.to(DEVICE), create_optimizer_v2(model, opt="adam", lr=1e-3), *loaders)


def _fastai_epoch(args: argparse.Namespace) -> float:
    from fastai.vision.all import ImageDataLoaders, Resize, vision_learner

    dls = ImageDataLoaders.from_folder(
        args.folder, train="train", valid="val", item_tfms=Resize(args.size), bs=args.batch, device=DEVICE
    )
    learner = vision_learner(dls, getattr(torchvision.models, args.backbone), pretrained=False)
    learner.freeze()
    started = time.perf_counter()
    with learner.no_bar(), learner.no_logging():
        learner.fit(1)
    return time.perf_counter() - started


def _seconds_of_epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, train: Iterable[Any], val: Iterable[Any]
) -> float:
    """One epoch of training and validation as tutorials write it."""
    started = time.perf_counter()
    model.train()
    for images, labels in train:
        loss = nn.functional.cross_entropy(model(images.to(DEVICE)), labels.to(DEVICE))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        sum((model(images.to(DEVICE)).argmax(1).cpu() == labels).sum().item() for images, labels in val)
    return time.perf_counter() - started


CONTENDERS: dict[str, Callable[[argparse.Namespace], float]] = {
    "plain": _plain_epoch,
    "timm": _timm_epoch,
    "fastai": _fastai_epoch,
}

if __name__ == "__main__":
    main()
