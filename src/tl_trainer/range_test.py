"""The learning-rate range test (Smith, Cyclical Learning Rates, WACV 2017) for the last phase of a configuration."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from tl_trainer.assembly import Setup, set_up
from tl_trainer.config.data import expand
from tl_trainer.config.load import Loaded
from tl_trainer.config.schema import Config
from tl_trainer.data.loaders import Batch
from tl_trainer.errors import InputError, RunError
from tl_trainer.feeds import close
from tl_trainer.ground.files import csv_text, make_folder, numbered_folder, write_bytes, write_text
from tl_trainer.ground.progress import bar
from tl_trainer.loop import Training
from tl_trainer.plots import png, rates_figure
from tl_trainer.run import new_training, summary
from tl_trainer.search import search
from tl_trainer.teacher import teacher_of
from tl_trainer.tracking import log_rates

log = logging.getLogger(__name__)

LOWEST, HIGHEST = 1e-7, 10.0  # rates
FEWEST, MOST = 100, 200  # batches: a pass, but with fewer the rates would rise faster than the running mean follows
KEPT = 0.9  # of the running mean of the loss with each batch
DIVERGED = 4  # times the lowest mean loss, above which the test ends


class Point(NamedTuple):
    """A batch of the test: the rate of its update, its loss before that, and the running mean of the losses."""

    rate: float
    loss: float
    mean: float


def find_rate(loaded: Loaded) -> dict[str, Any]:
    """Train batches at rising rates; a new folder in output.dir has rates.csv, rates.png and the curve for TensorBoard.

    What is returned has the `folder`, and the suggested `lr` with the `words` that set it, or null where no rate made
    the loss fall. A head that the first phase finds is found first. Raises a TrainerError.
    """
    started, config = time.perf_counter(), loaded.config
    if config.phases[-1].search == "auto":
        raise InputError(
            "--find-lr tests what trains for epochs, and here the head is found, without a learning rate; set "
            "train.epochs to train it"
        )
    output = expand(config.output.dir)
    make_folder(output, "--output")
    setup = set_up(loaded)
    log.info("%s", summary(setup))
    setup.teach = teacher_of(setup)
    _find_head(setup)
    feeds = setup.feeds()
    try:
        state = setup.new_state(len(feeds["train"].batches))
        points = curve(new_training(setup, feeds, state, lambda: None), config.phases[-1].optimizer.lr)
    finally:
        close(feeds)
    folder = numbered_folder(output, f"{loaded.name}-lr")
    write_text(folder / "rates.csv", csv_text(("rate", "loss", "mean_loss"), points))
    picture = png(rates_figure(points, rate := suggested(points)))
    write_bytes(folder / "rates.png", picture)
    if config.output.tensorboard:
        log_rates(folder, points, picture)
    return {
        "folder": str(folder),
        "batches": len(points),
        "lr": rate,
        "words": None if rate is None else words(config, rate),
        "seconds": round(time.perf_counter() - started, 3),
    }


def curve(training: Training, lr: float) -> list[Point]:
    """The loss at exponentially rising rates in place of `lr`, to which all other rates keep their ratio."""
    state, points, mean = training.state, list[Point](), 0.0
    shares = [group["lr"] / lr for group in state.optimizer.param_groups]
    steps = min(MOST, max(FEWEST, len(training.feed.batches)))
    state.classifier.train()
    for number, batch in zip(range(steps), bar(_passes(training), "learning rates", steps), strict=False):
        rate = LOWEST * (HIGHEST / LOWEST) ** (number / max(1, steps - 1))
        for group, share in zip(state.optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * share
        loss = training.step(batch)
        if not math.isfinite(loss):
            break
        state.progress.batch_ended(loss, len(batch.targets), 0.0)
        mean = KEPT * mean + (1 - KEPT) * loss
        points.append(Point(rate, loss, mean / (1 - KEPT ** (number + 1))))
        if points[-1].mean > DIVERGED * min(point.mean for point in points):
            break
    if not points:
        raise RunError(f"the loss of the first batch is {loss}, before any update; look at the images and the weights")
    return points


def _passes(training: Training) -> Iterator[Batch]:
    """The batches of one pass after the other, counted as in a run, which mixing and accumulating go by."""
    progress = training.state.progress
    while True:
        yield from training.feed.batches.epoch(progress.epoch, training.device)
        progress.epoch, progress.batch = progress.epoch + 1, 0


def suggested(points: list[Point]) -> float | None:
    """Where the decade of rates begins over which the mean loss falls most; None where it falls over none.

    Not a tenth of the rate of the lowest loss: a head that memorises its few images has that just before it diverges.
    """
    decade = sum(point.rate < 10 * points[0].rate for point in points)
    falls = [(after.mean - before.mean, before.rate) for before, after in zip(points, points[decade:], strict=False)]
    fall, rate = min(falls, default=(0.0, 0.0))
    return float(f"{rate:.1e}") if fall < 0 else None


def words(config: Config, rate: float) -> str:
    """What sets the rate on the command line, and with it that of the head, where this has its own."""
    optimizer, general = config.phases[-1].optimizer, config.train.optimizer
    keys = {"lr": rate}
    if optimizer.head_lr is not None:
        keys["head_lr"] = float(f"{rate * optimizer.head_lr / optimizer.lr:.1e}")
    if (optimizer.lr, optimizer.head_lr) == (general.lr, general.head_lr):
        return " ".join(f"train.optimizer.{key}={value:g}" for key, value in keys.items())
    return ", ".join(f"{key}: {value:g}" for key, value in keys.items()) + " in the optimizer of the last phase"


def _find_head(setup: Setup) -> None:
    """Put the head in place that the first phase finds; say which phases before the last are left out."""
    first, *others = setup.parts.config.phases
    if not others:
        return
    trained = len(others) - 1 + (first.search == "off")
    if trained:
        log.info("the test is for the last phase; %d before it train first in a run, and are left out here", trained)
    if first.search == "auto":
        feeds = setup.feeds(0)
        found = search(setup, feeds, lambda: None)
        close(feeds)
        if found is not None:
            setup.parts.take_head(found.layers, unit=found.unit)
