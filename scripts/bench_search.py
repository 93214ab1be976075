#!/usr/bin/env python3
"""The linear head that the search finds against scikit-learn's, on features made for it, on the same cores.

    scripts/bench_search.py [--images 3000] [--width 1280] [--classes 10]

Both solve the same strengths on standardised features. `loss` and `top1` are those of the best strength on as many
validation images, `test` is top-1 on 20,000 others. scikit-learn is asked for up to 5,000 iterations.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional

from bench_report import report
from tl_trainer.logistic import Axes, path
from tl_trainer.search import STRENGTHS

Head = Callable[[Tensor], Tensor]
COLUMNS = ("solver", "seconds", "loss", "top1", "test")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=10)
    args = parser.parse_args()
    (features, targets), val, test = splits(args.images, args.width, args.classes)
    rows = []
    for name, solve in (("search", searched), ("scikit-learn", sklearns)):
        started, heads = time.perf_counter(), solve(features, targets, args.classes)
        seconds = time.perf_counter() - started
        losses = [functional.cross_entropy(head(val[0]), val[1]).item() for head in heads]
        best = heads[losses.index(min(losses))]
        top1, on_test = ((best(x).argmax(dim=1) == y).double().mean().item() for x, y in (val, test))
        rows.append((name, seconds, min(losses), top1, on_test))
    result = {row[0]: dict(zip(COLUMNS[1:], row[1:], strict=True)) for row in rows}
    report(COLUMNS, rows, {**vars(args), **result})


def splits(images: int, width: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    """Train, val, test: classes that overlap, in features with a spectrum that falls, none negative, standardised."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.02, width).square()
    middles = 0.12 * torch.randn(classes, width, generator=generator)
    found = []
    for count in (images, images, 20_000):
        targets = torch.randint(classes, (count,), generator=generator)
        drawn = middles[targets] + torch.randn(count, width, generator=generator)
        found.append(((drawn @ axes / width**0.5).relu(), targets))
    deviation, mean = torch.std_mean(found[0][0], dim=0)
    return [((features - mean) / deviation, targets) for features, targets in found]


def searched(features: Tensor, targets: Tensor, classes: int) -> list[Head]:
    shares, soft = torch.ones(1, len(features)), functional.one_hot(targets, classes).float()
    found = [solution.head() for solution in path(Axes.of(features), soft, shares, STRENGTHS)]
    return [lambda x, weight=weight, bias=bias: x @ weight.T + bias for weight, bias in found]  # type: ignore[misc]


def sklearns(features: Tensor, targets: Tensor, classes: int) -> list[Head]:
    heads: list[Head] = []
    for strength in STRENGTHS:
        model = LogisticRegression(C=1 / (len(features) * strength), max_iter=5000)
        model.fit(features.numpy(), targets.numpy())
        heads.append(lambda x, model=model: torch.from_numpy(model.decision_function(x.numpy())))  # type: ignore[misc]
    return heads


if __name__ == "__main__":
    main()
