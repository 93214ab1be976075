#!/usr/bin/env python3
"""Cross-validation of the head that is found: its time, and how often its 95% interval holds the truth.

    scripts/bench_folds.py [--images 3000] [--width 1280] [--classes 10] [--sets 200]

`seconds` are for 10 folds on features made for it. Of each simulated set, of 100 to 400 images, the interval is right
if it holds the top-1, on 20,000 fresh images, of the head that all of the set gives with the choice of its folds. In
the sets of `with groups` 2 to 10 images of a class are a group that looks alike and that no fold divides; the fresh
images are of other groups.
"""

from __future__ import annotations

import argparse
import random
import time
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bench_report import report
from bench_search import splits
from tl_trainer.cross_validation import interval, out_of_fold
from tl_trainer.logistic import Axes, path
from tl_trainer.single_label import SingleLabel
from tl_trainer.tables import SCALINGS, Table

FOLDS, FRESH = 10, 20_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("images", 3000), ("width", 1280), ("classes", 10), ("sets", 200)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    (features, targets), *_ = splits(args.images, args.width, args.classes)
    train = table(features, targets, args.classes)
    started = time.perf_counter()
    out_of_fold(train, features, folds_of(targets, args.classes), [*SCALINGS])
    rows = [("seconds", time.perf_counter() - started)]
    rows += [("coverage", coverage(args.sets)), ("with groups", coverage(args.sets, grouped=True))]
    report(("figure", "value"), rows, {**vars(args), **dict(rows)})


def coverage(sets: int, *, grouped: bool = False) -> float:
    """The share of simulated sets whose interval holds the truth."""
    return sum(holds_the_truth(seed, grouped=grouped) for seed in range(sets)) / sets


def holds_the_truth(seed: int, *, grouped: bool = False) -> bool:
    """Whether the 95% interval of a simulated set holds the top-1 on fresh images."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    count, classes, width = rng.choice([100, 200, 400]), rng.choice([2, 4]), rng.choice([10, 40])
    middles = rng.choice([0.5, 1.0]) * torch.randn(classes, width, generator=generator) * (20 / width) ** 0.5
    targets, groups = torch.arange(count + FRESH) % classes, list[str]()
    features = middles[targets] + torch.randn(count + FRESH, width, generator=generator)
    if grouped:
        sizes = [size for size in (2, 5, 10) if size == 2 or count >= FOLDS * size * classes]
        size, share = rng.choice(sizes), rng.choice([0.3, 0.7])  # of a group, of the variance that it shares
        number = torch.arange(count + FRESH) // classes // size * classes + targets
        number[count:] += count  # of the fresh none is in a group of the set
        alike = torch.randn(int(number.max()) + 1, width, generator=generator)[number]
        features = middles[targets] + share**0.5 * alike + (1 - share) ** 0.5 * (features - middles[targets])
        groups = [str(group) for group in number[:count].tolist()]
    train = table(features[:count], targets[:count], classes)
    logits, choices = out_of_fold(train, train.features, folds_of(train.targets, classes, groups), ["raw"])
    low, high = interval(logits.argmax(dim=1) == train.targets, groups)
    strength = Counter(choice.strength for choice in choices).most_common(1)[0][0]
    *_, solution = path(
        Axes.of(train.features), train.soft, torch.ones(1, count), [100 * strength, 10 * strength, strength]
    )
    weight, bias = solution.head()
    said = (features[count:] @ weight.T + bias).argmax(dim=1)
    return low <= (said == targets[count:]).double().mean().item() <= high


def table(features: Tensor, targets: Tensor, classes: int) -> Table:
    """With one view of each image."""
    return Table(features, targets, functional.one_hot(targets, classes).float(), torch.arange(len(targets)))


def folds_of(targets: Tensor, classes: int, groups: Sequence[str] = ()) -> Tensor:
    """The fold of each image."""
    return torch.tensor(SingleLabel([*map(str, range(classes))]).folds(targets.tolist(), FOLDS, 0, groups))


if __name__ == "__main__":
    main()
