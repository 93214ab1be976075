#!/usr/bin/env python3
"""What several heads cost over one: seconds of an epoch, of heads alone on cached features and with a trainable end.

    scripts/bench_heads.py [--images 2000] [--width 1280] [--heads 3] [--classes 10]

Features and labels are random. With the end trained, a stage of two Linear as wide as the features stands for it.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import nn

from bench_report import report
from tl_trainer.config.training import LossSection
from tl_trainer.data.loaders import batch_order
from tl_trainer.multitask import Head, MultiTask
from tl_trainer.single_label import SingleLabel

BATCH, EPOCHS = 48, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 2000), ("width", 1280), ("heads", 3), ("classes", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rows = []
    for what, end in (("heads alone", False), ("with an end", True)):
        one, several = seconds(args, 1, end), seconds(args, args.heads, end)
        rows.append((what, one, several, several / one))
    found = {what: {"one": one, "several": several, "ratio": ratio} for what, one, several, ratio in rows}
    report(("seconds of an epoch", "one head", f"{args.heads} heads", "ratio"), rows, {**vars(args), **found})


def seconds(args: argparse.Namespace, heads: int, end: bool) -> float:
    """The fastest of a few epochs; one head is a task of one class per image, as a run without heads has it."""
    torch.manual_seed(0)
    features = torch.randn(args.images, args.width)
    labels = torch.randint(args.classes, (args.images, heads))
    names = [f"class {number}" for number in range(args.classes)]
    if heads == 1:
        targets, criterion = labels[:, 0], SingleLabel(names).criterion(LossSection(), labels[:, 0].tolist())
    else:
        width = args.classes
        tasks = [Head(str(at), SingleLabel(names), slice(at * width, (at + 1) * width)) for at in range(heads)]
        targets = torch.nn.functional.one_hot(labels, width).flatten(1)
        criterion = MultiTask(tasks).criterion(LossSection(), targets.tolist())
    body = [nn.Linear(args.width, args.width), nn.ReLU(), nn.Linear(args.width, args.width)] if end else []
    network = nn.Sequential(*body, nn.Linear(args.width, heads * args.classes))
    optimizer = torch.optim.Adam(network.parameters())
    best = float("inf")
    for epoch in range(EPOCHS):
        started = time.perf_counter()
        for indices in batch_order(np.arange(args.images), BATCH, 0, epoch, shuffle=True):
            loss = criterion(network(features[indices]), targets[indices])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss.item()
        best = min(best, time.perf_counter() - started)
    return best


if __name__ == "__main__":
    main()
