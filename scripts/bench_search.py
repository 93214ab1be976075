#!/usr/bin/env python3
"""The heads that the search finds against other ways to a head, on features made for it, on the same cores.

    scripts/bench_search.py solver [--images 3000] [--width 1280] [--classes 10] [--photos DIR] [--short]
    scripts/bench_search.py mlp    [--images 3000] [--width 1280] [--classes 10]
    scripts/bench_search.py former [--photos DIR]

solver: against scikit-learn's LogisticRegression, for each scaling of the features. Both solve the same strengths, from
strong to weak, each once, without folds; with --short both end where a search does, at 1.25 times the lowest log loss,
and take every fourth strength. `loss` and `top1` are those of the best strength on as many validation images, `test` is
top-1 on 20,000 others, and `to best` the loss divided by the lowest of scikit-learn for that scaling. scikit-learn is
asked for up to 5,000 iterations, with its own tolerance and, with --tight, with 1e-6 in float64: with its own it ends
early, which at small strengths is another, milder problem. `chosen` is what the search takes of all: among those that
cannot be told from the lowest log loss the one that is right most often, so its log loss is higher. With --photos the
features are those of the default backbone for a folder with train and val. scikit-learn comes last: the threads of its
BLAS keep turning for a while after each call, which slowed others down by half.

mlp: 48 heads with 256 hidden units against one of them alone, with the settings of the best.

former: against a Linear trained as it was by default before there was a search (Adam, 1e-3, 10 epochs, batches of 48;
its best epoch), on generated features of several kinds and the photographs in DIR, a folder with train and val.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

import tl_trainer
from bench_report import report
from tl_trainer import mlp
from tl_trainer.assembly import set_up
from tl_trainer.comparison import compare
from tl_trainer.config.load import load
from tl_trainer.logistic import HOPELESS, STRENGTHS, Axes, path
from tl_trainer.search import table_of
from tl_trainer.tables import SCALINGS, Table

FRESH = 20_000  # images of the test split
Head = Callable[[Tensor], Tensor]
Solved = Iterator[tuple[float, Head]]  # strengths and heads
Split = tuple[Tensor, Tensor]
SOLVERS = ("solver", "features", "seconds", "strengths", "best L2", "loss", "to best", "top1", "test")
KINDS = {  # images, width, classes, and how much rarer each class is than the one before
    "ants/bees": (244, 1280, 2, 1.0), "demo": (60, 512, 3, 1.0), "CIFAR": (2000, 512, 10, 1.0),
    "imbalanced": (600, 512, 5, 0.4), "20 images": (20, 512, 2, 1.0),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("solver", "mlp", "former"))
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--photos", metavar="DIR", help="for solver and former: photographs with train and val")
    parser.add_argument("--short", action="store_true", help="for solver: fewer strengths, up to a hopeless one")
    parser.add_argument("--tight", action="store_true", help="for solver: scikit-learn with tol 1e-6 and float64 too")
    args = parser.parse_args()
    columns, rows = {"solver": solvers, "mlp": heads_at_once, "former": against_former}[args.what](args)
    report(columns, rows, {**vars(args), "rows": [dict(zip(columns, row, strict=True)) for row in rows]})


def splits(images: int, width: int, classes: int, rarer: float = 1.0, *, raw: bool = False) -> list[Split]:
    """Train, val, test: classes that overlap, in features with a spectrum that falls, none negative, standardised
    unless `raw`."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.randn(width, width, generator=generator) * torch.linspace(1, 0.02, width).square()
    middles = 0.12 * torch.randn(classes, width, generator=generator)
    shares = rarer ** torch.arange(classes)
    found = []
    for count in (images, images, FRESH):
        targets = torch.multinomial(shares, count, replacement=True, generator=generator)
        drawn = middles[targets] + torch.randn(count, width, generator=generator)
        found.append(((drawn @ axes / width**0.5).relu(), targets))
    if raw:
        return found
    deviation, mean = torch.std_mean(found[0][0], dim=0)
    return [((features - mean) / deviation, targets) for features, targets in found]


def solvers(args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    if args.photos:
        setup = set_up(load(args.photos))
        feeds = setup.feeds()
        train, val = (table_of(setup.parts, feeds[name].batches.features) for name in ("train", "val"))
        test = val
    else:
        made = splits(args.images, args.width, args.classes, raw=True)
        train, val, test = (table(*split, args.classes) for split in made)
    ways: dict[str, Callable[[Table, list[float]], Solved]] = {"scikit-learn": sklearns}
    if args.tight:
        ways["scikit-learn, tol 1e-6"] = partial(sklearns, tolerance=1e-6)
    scaled = {}
    for name, of in SCALINGS.items():
        scaling = of(train.features)
        scaled[name] = [part._replace(features=scaling(part.features)) for part in (train, val, test)]
    mine = {name: best_of(searched, tables, short=args.short) for name, tables in scaled.items()}
    started = time.perf_counter()
    found_head = compare(train, val).found()
    seconds, row = time.perf_counter() - started, found_head.best
    rows: list[tuple[object, ...]] = []
    for name, tables in scaled.items():
        found = {way: best_of(solve, tables, short=args.short) for way, solve in ways.items()}
        lowest = min(best.loss for best in found.values())
        for way, best in {"search": mine[name], **found}.items():
            figures = f"{best.loss:.5f}", f"{best.loss / lowest:.4f}", f"{best.top1:.4f}", f"{best.test:.4f}"
            rows.append((way, name, best.seconds, best.solved, f"{best.strength:.2g}", *figures))
    head = linear(*found_head.layers[0], unit=found_head.unit)
    figures = f"{log_loss(head, val):.5f}", "-", f"{top1(head, val):.4f}", f"{top1(head, test):.4f}"
    rows.append(("chosen", row.scaling, seconds, len(found_head.rows), f"{row.strength:.2g}", *figures))
    return SOLVERS, rows


class Best(NamedTuple):
    """The best strength of a solver, its figures, and what it took to solve all."""

    loss: float
    strength: float
    top1: float
    test: float
    seconds: float
    solved: int


def best_of(solve: Callable[[Table, list[float]], Solved], tables: Sequence[Table], *, short: bool) -> Best:
    train, val, test = tables
    judged, seconds, solved = list[tuple[float, float, Head]](), 0.0, solve(train, STRENGTHS[:: 4 if short else 1])
    started = time.perf_counter()
    for strength, head in solved:
        seconds += time.perf_counter() - started
        judged.append((log_loss(head, val), strength, head))
        if short and judged[-1][0] > HOPELESS * min(judged, key=lambda one: one[0])[0]:
            break
        started = time.perf_counter()
    loss, strength, head = min(judged, key=lambda one: one[0])
    return Best(loss, strength, top1(head, val), top1(head, test), seconds, len(judged))


def searched(train: Table, strengths: list[float]) -> Solved:
    for solution in path(Axes.of(train.features), train.soft, torch.ones(1, len(train.targets)), strengths):
        yield solution.strength, linear(*solution.head())


def sklearns(train: Table, strengths: list[float], tolerance: float = 1e-4) -> Solved:
    from sklearn.linear_model import LogisticRegression

    classes = train.soft.shape[1]
    once = 2 if classes == 2 else 1  # for two classes it has one weight, which its penalty counts once
    features = train.features if tolerance == 1e-4 else train.features.double()

    def solved(strength: float) -> tuple[float, Head]:
        model = LogisticRegression(C=once / (len(features) * strength), max_iter=5000, tol=tolerance)
        model.fit(features.numpy(), train.targets.numpy())
        weight, bias = torch.from_numpy(model.coef_).float(), torch.from_numpy(model.intercept_).float()
        return strength, linear(*(torch.cat([-part, part]) / 2 if classes == 2 else part for part in (weight, bias)))

    return map(solved, strengths)


def heads_at_once(args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    (features, targets), val, _ = splits(args.images, args.width, args.classes)
    train = mlp.Samples(features, functional.one_hot(targets, args.classes).float(), args.images)

    def trained(settings: Sequence[mlp.Setting]) -> tuple[mlp.Trained, float, float]:
        """The best of the heads, its log loss, and the seconds that all of them took."""
        started = time.perf_counter()
        heads = mlp.train_heads(train, val, mlp.Plan([256], 48, 0), settings)
        seconds = time.perf_counter() - started
        losses = [functional.cross_entropy(head.logits, val[1]).item() for head in heads]
        return heads[losses.index(min(losses))], min(losses), seconds

    grid = [mlp.Setting(*of) for of in itertools.product(mlp.RATES, mlp.DECAYS, mlp.DROPOUTS)]
    best, loss, seconds = trained(grid)
    again, loss_alone, alone = trained([best.setting])
    return ("heads", "seconds", "times", "best epoch", "loss"), [
        (f"{len(grid)} heads", seconds, seconds / alone, best.epoch, f"{loss:.4f}"),
        ("the best alone", alone, 1.0, again.epoch, f"{loss_alone:.4f}"),
    ]


def against_former(args: argparse.Namespace) -> tuple[Sequence[str], list[tuple[object, ...]]]:
    rows: list[tuple[object, ...]] = []
    for kind, (images, width, classes, rarer) in KINDS.items():
        train, val, test = splits(images, width, classes, rarer)
        found = compare(table(*train, classes), table(*val, classes)).found()
        [layer] = found.layers
        chosen = linear(*layer, unit=found.unit)
        for name, head in (("found", chosen), ("former", former(train, val, classes))):
            loss = functional.cross_entropy(head(val[0]), val[1]).item()
            rows.append((kind, name, top1(head, val), loss, top1(head, test)))
    if args.photos:
        for name, search in (("found", "auto"), ("former", "off")):
            with tempfile.TemporaryDirectory() as folder:
                output = {"output__dir": folder, "output__report": False, "output__tensorboard": False}
                val_figures = tl_trainer.train(args.photos, train__search=search, **output)["val"]
            rows.append(("photographs", name, val_figures["top1"], val_figures["loss"], "-"))
    return ("features", "head", "val top1", "val loss", "test top1"), rows


def table(features: Tensor, targets: Tensor, classes: int) -> Table:
    return Table(features, targets, functional.one_hot(targets, classes).float(), torch.arange(len(targets)))


def former(train: Split, val: Split, classes: int) -> Head:
    torch.manual_seed(0)
    layer = nn.Linear(train[0].shape[1], classes)
    optimizer, best = torch.optim.Adam(layer.parameters(), 1e-3), (-1.0, 0.0, linear(layer.weight, layer.bias))
    for _ in range(10):
        for rows in torch.randperm(len(train[0])).split(48):
            optimizer.zero_grad()
            functional.cross_entropy(layer(train[0][rows]), train[1][rows]).backward()
            optimizer.step()
        head = linear(layer.weight.detach().clone(), layer.bias.detach().clone())
        figures = top1(head, val), -functional.cross_entropy(head(val[0]), val[1]).item()
        best = max(best, (*figures, head), key=lambda epoch: epoch[:2])
    return best[2]


def linear(weight: Tensor, bias: Tensor, unit: bool = False) -> Head:
    return lambda features: (functional.normalize(features) if unit else features) @ weight.T + bias


def log_loss(head: Head, split: Table) -> float:
    return functional.cross_entropy(head(split.features).double(), split.targets).item()


def top1(head: Head, split: Split | Table) -> float:
    return (head(split[0]).argmax(dim=1) == split[1]).double().mean().item()


if __name__ == "__main__":
    main()
